"""Time and memory of one update of a language model: log-probabilities, entropy and values of a batch, or DPO's loss,
forward and backward, on a Llama-shaped model of random weights.

Each measurement is a process of its own. With another checkout of this project, its processes and ours take turns.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

TASKS = ("evaluate", "dpo")


@dataclass(frozen=True)
class Shape:
    """A batch, and a model of SmolLM2-135M's width. A row is one token of prompt and ``tokens`` of response."""

    rows: int = 8
    tokens: int = 256
    layers: int = 4
    vocabulary: int = 49_152
    threads: int = os.cpu_count() or 1


def run(shape: Shape, rounds: int, against: Path | None, out: Path | None) -> Path:
    """Measure, print and write the CSV; where it is.

    Args:
        shape: of model and batch.
        rounds: processes per task and way; medians are reported, and medians of ratios.
        against: the root of another checkout.
        out: benchmarks/results/memory-cpu.csv if None.

    Raises:
        RuntimeError: a process failed; the message is its last line.
    """
    from lm_envs.benchmarks.run.storage import write_lines
    from lm_envs.benchmarks.speed.kernels import RESULTS, machine

    ways = {"this": Path(__file__).resolve().parents[2]} | ({} if against is None else {"against": against.resolve()})
    lines: list[dict[str, Any]] = []
    for task in TASKS:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for turn in range(rounds):
            for way in list(ways)[:: 1 if turn % 2 == 0 else -1]:
                found[way].append(_child(ways[way], task, shape))
        for way, several in found.items():
            line: dict[str, Any] = {"task": task, "way": way}
            for key, unit in (("seconds", 1), ("cpu_seconds", 1), ("peak_MB", 1e6)):
                line[key] = round(statistics.median(one[key] for one in several) / unit, 3)
                pairs = zip(several, found["against"], strict=True) if against is not None else ()
                line[f"of_{key}"] = round(statistics.median(a[key] / b[key] for a, b in pairs), 3) if against else ""
            lines.append(line | asdict(shape) | {"rounds": rounds} | machine("cpu"))
            print(", ".join(f"{name} {value}" for name, value in lines[-1].items()), flush=True)
    out = out or RESULTS / "memory-cpu.csv"
    write_lines(out, lines, list(lines[0]))
    return out


def _child(root: Path, task: str, shape: Shape) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(shape.threads)}
    command = [sys.executable, __file__, json.dumps({"task": task, **asdict(shape)})]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    if done.returncode != 0:
        raise RuntimeError(f"measuring {task!r} in {root} failed: {(done.stderr.strip() or '?').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _be_child(task: str, **given: int) -> dict[str, float]:
    """One update after another; the first allocates. Gradients are new each time, and count as such."""
    from live_memory import LiveMemory  # the module beside this one, which runs as a script

    sys.path.pop(0)
    try:
        from lm_envs.algos.ops.losses import dpo_loss
        from lm_envs.algos.policies.language_model import LMPolicy
    except ImportError:  # a checkout from before these folders
        from lm_envs.algos.policies import LMPolicy
        from lm_envs.algos.preference_losses import dpo_loss
    from transformers import LlamaConfig, LlamaForCausalLM

    from lm_envs.trajectories import Trajectories

    shape = Shape(**given)
    torch.set_num_threads(shape.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=shape.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=shape.tokens + 1,
        tie_word_embeddings=False,
    )
    policy = LMPolicy(LlamaForCausalLM(config), 0, 1, shape.tokens)
    text = torch.randint(1, shape.vocabulary, (shape.rows, 1 + shape.tokens))
    weights = torch.randn(3, shape.rows, shape.tokens)
    one = torch.ones(shape.rows, dtype=torch.bool)
    traj = Trajectories(
        obs=text,
        actions=text[:, 1:],
        logprob=torch.zeros(weights[0].shape),
        reward=torch.zeros(weights[0].shape),
        mask=one[:, None].expand(weights[0].shape),
        terminated=one,
        truncated=~one,
        prompt=text[:, :1],
        response=text[:, 1:],
    )

    def update() -> None:
        policy.zero_grad(set_to_none=True)
        now = policy.evaluate(traj)
        if task == "dpo":
            rank = torch.arange(2).expand(shape.rows // 2, 2)
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
