"""Time and memory of one update of a language model: log-probabilities, entropy and values of a batch, or DPO's loss,
forward and backward, on a Llama-shaped model of random weights.

Each measurement is a process of its own. With another checkout of this project, its processes and ours take turns.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lm_envs.benchmarks.speed.settings import Memory

TASKS = ("evaluate", "dpo")
SHAPE = ("rows", "tokens", "layers", "vocabulary", "threads")


def run(settings: Memory, against: Path | None, out: Path | None) -> Path:
    """Measure, beside another checkout if its root is given, print and write the CSV; where it is.

    Raises:
        RuntimeError: a process failed; the message is its last line.
    """
    from lm_envs.benchmarks.run.storage import write_lines
    from lm_envs.benchmarks.speed.kernels import RESULTS, child, in_turns, machine, ratio

    shape = {name: getattr(settings, name) for name in SHAPE}
    ways = {"this": Path(__file__).resolve().parents[2]}
    ways |= {} if against is None else {"against": against.resolve()}
    lines: list[dict[str, Any]] = []
    for task in TASKS:

        def one(way: str, task: str = task) -> dict[str, float]:
            path = {"PYTHONPATH": str(ways[way])}
            return child([__file__], {"task": task, **shape}, settings.threads, env=path, cwd=ways[way])

        found = in_turns(ways, settings.rounds, one)
        for way, several in found.items():
            line: dict[str, Any] = {"task": task, "way": way}
            for key, unit in (("seconds", 1), ("cpu_seconds", 1), ("peak_MB", 1e6)):
                own, base = ([one[key] for one in given] for given in (several, found.get("against", several)))
                line[key] = round(statistics.median(own) / unit, 3)
                line[f"of_{key}"] = round(ratio(own, base), 3) if "against" in ways else ""
            lines.append(line | shape | {"rounds": settings.rounds} | machine("cpu"))
            print(", ".join(f"{name} {value}" for name, value in lines[-1].items()), flush=True)
    out = out or RESULTS / "memory-cpu.csv"
    write_lines(out, lines, list(lines[0]))
    return out


def _be_child(task: str, rows: int, tokens: int, layers: int, vocabulary: int, threads: int) -> dict[str, float]:
    """One update after another; the first allocates. Gradients are new each time, and count as such."""
    from live_memory import LiveMemory  # the module beside this one, which runs as a script

    sys.path.pop(0)
    try:
        from lm_envs.algos.ops.losses import dpo_loss
        from lm_envs.algos.policies.language_model import LMPolicy
    except ImportError:  # a checkout from before these folders
        from lm_envs.algos.policies import LMPolicy  # type: ignore[attr-defined,no-redef]
        from lm_envs.algos.preference_losses import dpo_loss  # type: ignore[import-not-found,no-redef]
    from transformers import LlamaConfig, LlamaForCausalLM

    from lm_envs.trajectories import Trajectories

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=tokens + 1,
        tie_word_embeddings=False,
    )
    policy = LMPolicy(LlamaForCausalLM(config), 0, 1, tokens)
    text = torch.randint(1, vocabulary, (rows, 1 + tokens))
    prompt, response = text[:, :1], text[:, 1:]
    weights, zero, one = torch.randn(3, rows, tokens), torch.zeros(rows, tokens), torch.ones(rows, dtype=torch.bool)
    made = dict(obs=text, actions=response, prompt=prompt, response=response, logprob=zero, reward=zero)
    traj = Trajectories(mask=one[:, None].expand(rows, tokens), terminated=one, truncated=~one, **made)

    def update() -> None:
        policy.zero_grad(set_to_none=True)
        now = policy.evaluate(traj)
        if task == "dpo":
            rank = torch.arange(2).expand(rows // 2, 2)
            dpo_loss(now.logprob.sum(1).view(-1, 2), rank, 0.1).backward()
        else:
            terms = zip(weights, (now.logprob, now.entropy, now.value[:, :-1]), strict=True)
            torch.stack([(w * x).mean() for w, x in terms]).sum().backward()

    update()
    start, used = time.perf_counter(), time.process_time()
    update()
    found = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
    policy.zero_grad(set_to_none=True)
    gc.collect()
    memory = LiveMemory()
    memory.start()
    update()
    return found | {"peak_MB": memory.stop(lasting=False)}


if __name__ == "__main__":
    print(json.dumps(_be_child(**json.loads(sys.argv[1]))))
