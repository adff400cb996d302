"""Time and memory of one update of a language model, forward and backward: log-probabilities, entropy and values of a
batch, or DPO's loss, on a Llama-shaped model of random weights.

Each measurement is a process of its own. With another checkout of this project, its processes and ours take turns.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lm_envs.benchmarks.speed.settings import Memory

TASKS = ("evaluate", "dpo")
SHAPE = ("rows", "tokens", "layers", "vocabulary", "threads")


def run(settings: Memory) -> None:
    """Measure, beside another checkout if its root is given, print and write the CSV.

    Raises:
        RuntimeError: a process failed; the message is its last line.
    """
    from lm_envs.benchmarks.speed.kernels import RESULTS
    from lm_envs.benchmarks.speed.throughput import record

    out = settings.out or RESULTS / "memory-cpu.csv"
    record(out, lines(settings), lambda line: ", ".join(f"{name} {value}" for name, value in line.items()))


def lines(settings: Memory) -> Iterator[list[dict[str, Any]]]:
    """Yield the CSV's lines, a task at a time."""
    from lm_envs.benchmarks.speed.kernels import child, in_turns, machine, ratio

    shape = {name: getattr(settings, name) for name in SHAPE}
    ways = {"this": Path(__file__).resolve().parents[2]}
    ways |= {} if settings.against is None else {"against": settings.against.resolve()}
    for task in TASKS:

        def one(way: str, task: str = task) -> dict[str, float]:
            path = {"PYTHONPATH": str(ways[way])}
            return child([__file__], {"task": task, **shape}, settings.threads, env=path, cwd=ways[way])

        found, batch = in_turns(ways, settings.rounds, one), []
        for way, several in found.items():
            line: dict[str, Any] = {"task": task, "way": way}
            for key, unit in (("seconds", 1), ("cpu_seconds", 1), ("peak_MB", 1e6)):
                own, base = ([one[key] for one in given] for given in (several, found.get("against", several)))
                line[key] = round(statistics.median(own) / unit, 3)
                line[f"of_{key}"] = round(ratio(own, base), 3) if "against" in ways else ""
            batch.append(line | shape | {"rounds": settings.rounds} | machine("cpu"))
        yield batch


def _be_child(task: str, rows: int, tokens: int, layers: int, vocabulary: int, threads: int) -> dict[str, float]:
    """Run one update after another; the first allocates. Gradients are new each time, and count as such."""
    beside = sys.path.pop(0)  # its modules are not top-level ones
    try:
        from lm_envs.algos.ops.losses import dpo_loss
        from lm_envs.algos.policies.language_model import LMPolicy
    except ImportError:  # a checkout from before these folders
        from lm_envs.algos.policies import LMPolicy  # type: ignore[attr-defined,no-redef]
        from lm_envs.algos.preference_losses import dpo_loss  # type: ignore[import-not-found,no-redef]
    from transformers import LlamaConfig, LlamaForCausalLM

    from lm_envs.trajectories import Trajectories

    sys.path.append(beside)
    from shared_work import LiveMemory  # this checkout's, whichever is measured

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    width = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    sizes = {"vocab_size": vocabulary, "num_hidden_layers": layers, "max_position_embeddings": tokens + 1}
    policy = LMPolicy(LlamaForCausalLM(LlamaConfig(**width, **sizes, tie_word_embeddings=False)), 0, 1, tokens)
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
