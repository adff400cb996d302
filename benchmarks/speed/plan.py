"""Plans against real runs: the most memory that a few iterations of PPO took, and their time, beside what
``lm-envs plan`` said.

Policy and reward model are Llamas of random weights with about 30 million parameters. Each plan and each run is a
command of a user, in processes of its own. Memory does not depend on what else the machine does; times do.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_envs.benchmarks.speed.settings import Plan

CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "full": ("--lora-rank", "0"),
    "lora": ("--lora-rank", "16"),
    "frozen layers": ("--freeze-layers", "4"),
    "bfloat16": ("--dtype", "bfloat16"),
    "fsdp": ("--lora-rank", "0", "--processes", "2", "--fsdp"),
}
_PROMPT, _PROMPTS = 32, 48


def run(settings: Plan) -> None:
    """Measure, print and write the CSV.

    Raises:
        RuntimeError: a command failed; the message is its last line.
    """
    from lm_envs.benchmarks.speed.kernels import RESULTS
    from lm_envs.benchmarks.speed.throughput import record

    out = settings.out or RESULTS / "plan-cpu.csv"
    record(out, lines(settings), lambda line: ", ".join(f"{name} {value}" for name, value in line.items()))


def lines(settings: Plan) -> Iterator[list[dict[str, Any]]]:
    """Yield the CSV's lines, one for each configuration."""
    from lm_envs.benchmarks.speed.kernels import machine
    from lm_envs.benchmarks.speed.throughput import Load

    shape = {name: getattr(settings, name) for name in ("width", "layers", "vocabulary")}
    work = {name: getattr(settings, name) for name in ("episodes", "micro_batch", "new_tokens", "threads")}
    with TemporaryDirectory() as folder:
        _finished([sys.executable, "-m", "lm_envs.benchmarks.speed.plan", json.dumps({"folder": folder, **shape})])
        for name in settings.configurations or CONFIGURATIONS:
            words = _words(Path(folder), settings, name)
            said, _ = _finished([sys.executable, "-m", "lm_envs", "plan", "train", *words, "--json"])
            (plan,) = json.loads(said)["plans"]
            load, out = Load([_Children()]), Path(folder) / name.replace(" ", "-")
            _, peak = _finished([sys.executable, "-m", "lm_envs", "train", *words, "--out", str(out)])
            seconds, foreign = _seconds(out), load.foreign()
            line = {"configuration": name, "parameters": plan["parameters"], "trained": plan["trained"]}
            line |= {"planned_MB": round(plan["memory"] / 1e6), "measured_MB": round(peak / 1e6)}
            line |= {"of_measured": round(plan["memory"] / peak, 3), "at": plan["peak"]}
            line |= {"planned_s": round(plan["seconds_per_iteration"], 3), "measured_s": round(seconds, 3)}
            line |= {"of_measured_s": round(plan["seconds_per_iteration"] / seconds, 3), "load": round(foreign, 3)}
            yield [line | shape | work | {"prompt": _PROMPT} | machine("cpu")]


class _Children:
    """The time that finished processes which this one started took on processors."""

    @property
    def cpu_seconds(self) -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime


def _words(folder: Path, settings: Plan, name: str) -> list[str]:
    """The options of a configuration's run, and of its plan."""
    words = [
        "--policy",
        f"{folder}/policy",
        "--reward",
        f"model:{folder}/reward",
        "--prompts",
        f"{folder}/prompts.jsonl",
    ]
    words += ["--algorithm", "ppo", "--iterations", str(settings.iterations), "--validate-every", "0"]
    words += ["--env", f"max_new_tokens={settings.new_tokens}", "--env", f"min_new_tokens={settings.new_tokens}"]
    words += ["--set", f"episodes={settings.episodes}", "--set", f"micro_batch={settings.micro_batch}"]
    words += ["--set", "epochs=2", "--set", "minibatches=2", "--threads", str(settings.threads)]
    return [*words, *CONFIGURATIONS[name]]


def _finished(command: Sequence[str]) -> tuple[str, int]:
    """What a command printed, and the most bytes that it, or a process that it started, held in memory."""
    with TemporaryFile("w+") as said, TemporaryFile("w+") as error:
        process = subprocess.Popen(command, stdout=said, stderr=error)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        error.seek(0)
        if process.returncode:
            raise RuntimeError((error.read().strip() or f"exit status {process.returncode}").splitlines()[-1])
        return said.read(), usage.ru_maxrss * 1024


def _seconds(out: Path) -> float:
    """The mean time of a run's iterations after the first, which allocates."""
    (records,) = out.rglob("metrics.jsonl")
    walls = [json.loads(line)["wall_s"] for line in records.read_text().splitlines()]
    return float((walls[-1] - walls[1]) / (len(walls) - 2))


def _make(folder: str, width: int, layers: int, vocabulary: int) -> None:
    """Save a policy, a reward model and prompts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from lm_envs.benchmarks.speed.shared_work import EOS, word_tokenizer

    torch.manual_seed(0)
    heads = max(2, width // 64)
    shared = next(count for count in range(heads // 2, 0, -1) if heads % count == 0)  # of keys and values
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": width * 11 // 4, "num_hidden_layers": layers}
    sizes |= {"vocab_size": vocabulary, "num_attention_heads": heads, "num_key_value_heads": shared}
    sizes |= {"max_position_embeddings": 1024, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS}
    tokenizer = word_tokenizer(vocabulary)
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).save_pretrained(f"{folder}/policy")
    LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1)).save_pretrained(f"{folder}/reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(f"{folder}/{name}")
    ids = torch.randint(1, vocabulary, (_PROMPTS, _PROMPT)).tolist()
    splits = ("train", "validation", "test")
    rows = [{"prompt": " ".join(f"w{i}" for i in row), "split": splits[n % 3]} for n, row in enumerate(ids)]
    Path(folder, "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    _make(**json.loads(sys.argv[1]))
