"""Each option of the commands that train changes what it is for, and nothing else."""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.commands import compare, learn, overoptimize, report, train
from lm_envs.benchmarks.report import overoptimization
from lm_envs.benchmarks.run.suite_files import load_suite

CUSTOM = ["--policy", "P", "--prompts", "FILE", "--reward-model", "R"]
ENV, ADAPT, PLAN = "suite.tasks.0.env", "suite.adaptation", "suite.plan"
RUNNING = {
    "out": (["--out", "X"], {"out": "X"}),
    "iterations": (["--iterations", "7"], {f"{PLAN}.iterations": 7}),
    "episodes": (["--episodes", "9"], {f"{PLAN}.episodes": 9}),
    "env": (["--env", "kl_coef=0.5", "--env", "min_new_tokens=2"], {f"{ENV}.kl_coef": 0.5, f"{ENV}.min_new_tokens": 2}),
    "test_prompts": (["--test-prompts", "11"], {f"{PLAN}.test_prompts": 11}),
    "resume": (["--resume"], {"resume": True}),
    "extend": (["--extend"], {"resume": True, "extend": True}),
    "keep": (["--keep", "17"], {"suite.keep": 17}),
    "track": (["--track", "wandb", "trackio"], {"track.0": "wandb", "track.1": "trackio"}),
    "show": (["--show", "23"], {"show": 23}),
    "guard": (
        ["--guard", "action=tell", "--guard", "distinct_2=0.5"],
        {"suite.guards.action": "tell", "suite.guards.distinct_2": 0.5},
    ),
    "stop": (
        ["--stop", "kl>20", "--stop", "gold  no better for 3"],
        {"suite.stop.0": "kl > 20", "suite.stop.1": "gold no better for 3"},
    ),
    "compile": (["--compile"], {"suite.compile": True}),
    "freeze_layers": (["--freeze-layers", "1"], {f"{ADAPT}.freeze_layers": 1}),
    "lora_rank": (["--lora-rank", "4"], {f"{ADAPT}.lora_rank": 4}),
    "lora_alpha": (["--lora-alpha", "2.5"], {f"{ADAPT}.lora_alpha": 2.5}),
    "lora_targets": (["--lora-targets", "q", "v"], {f"{ADAPT}.lora_targets": ["q", "v"]}),
    "lora_merge": (["--lora-merge"], {f"{ADAPT}.lora_merge": True}),
}
TRAIN = RUNNING | {
    "algorithm": (["--algorithm", "rloo"], {"suite.algorithms.0": "rloo"}),
    "task": (["--task", "enumerable"], {"suite.tasks.0.name": "enumerable"}),
    "seed": (["--seed", "21"], {"suite.seeds.0": 21}),
    "learning_rate": (["--learning-rate", "0.25"], {"suite.overrides.rloo.learning_rate": 0.25}),
    "set": (["--set", "epochs=3"], {"suite.overrides.rloo.epochs": 3}),
    "validate_every": (["--validate-every", "3"], {f"{PLAN}.validate_every": 3}),
    "checkpoint_every": (["--checkpoint-every", "14"], {f"{PLAN}.checkpoint_every": 14}),
    "threads": (["--threads", "5"], {"threads": 5}),
}
COMPARE = RUNNING | {
    "suite": (None, {}),  # below
    "task": (["--task", "enumerable"], {"suite.tasks.0.name": "enumerable"}),
    "algorithms": (["--algorithms", "rloo", "sft"], {"suite.algorithms.0": "rloo", "suite.algorithms.1": "sft"}),
    "seeds": (["--seeds", "4", "2"], {"suite.seeds.0": 4, "suite.seeds.1": 2}),
    "task_seeds": (["--task-seeds", "3"], {"suite.task_seeds": 3}),
    "match_kl": (["--match-kl", "2", "5"], {"suite.match_kl.0": 2.0, "suite.match_kl.1": 5.0}),
    "set": (["--set", "rloo.epochs=3"], {"suite.overrides.rloo.epochs": 3}),
    "jobs": (["--jobs", "6"], {"jobs": 6}),
    "ray": (["--ray", "HOST:1"], {"ray": "HOST:1"}),
    "threads": (["--threads", "5"], {"threads": 5}),
}
OPTIONS = "suite.tasks.0.options"
OWN = {
    name: ([f"--{name.replace('_', '-')}", f"V {name}"], {f"{OPTIONS}.{name}": f"V {name}"})
    for name in ("reference", "dtype", "device", "device_map", "policy", "reward_model")
} | {
    "prompts": (["--prompts", "OTHER"], {f"{OPTIONS}.prompts": "OTHER"}),
    "judge": (["--judge", "J"], {f"{OPTIONS}.judge": "J"}),
    "recompute": (["--recompute"], {f"{OPTIONS}.recompute": True}),
    "bad": (["--bad", "skip"], {f"{OPTIONS}.bad": "skip"}),
    "reward": (None, {}),  # below
    "corpus": (None, {}),
    "parallel": (None, {}),
}
LEARN = {
    "model": (["--model", "V"], {"spec.model": "V"}),
    "data": (["--data", "OTHER"], {"spec.data": "OTHER"}),
    "out": (["--out", "X"], {"out": "X"}),
    "epochs": (["--epochs", "2.5"], {"spec.epochs": 2.5}),
    "iterations": (["--iterations", "7"], {"spec.plan.iterations": 7}),
    "batch_size": (["--batch-size", "6"], {"spec.overrides.episodes": 6}),
    "learning_rate": (["--learning-rate", "0.25"], {"spec.overrides.learning_rate": 0.25}),
    "set": (["--set", "micro_batch=4"], {"spec.overrides.micro_batch": 4}),
    "bad": (["--bad", "skip"], {"spec.on_bad": "skip"}),
    "max_length": (["--max-length", "12"], {"spec.max_length": 12}),
    "max_rows": (["--max-rows", "13"], {"spec.max_rows": 13}),
    "held_out": (["--held-out", "0.25"], {"spec.held_out": 0.25}),
    "seed": (["--seed", "21"], {"spec.seed": 21}),
    "dtype": (["--dtype", "W"], {"spec.dtype": "W"}),
    "device": (["--device", "U"], {"spec.device": "U"}),
    "validate_every": (["--validate-every", "3"], {"spec.plan.validate_every": 3}),
    "checkpoint_every": (["--checkpoint-every", "14"], {"spec.plan.checkpoint_every": 14}),
    "resume": (["--resume"], {"resume": True}),
    "track": RUNNING["track"],
    "threads": (["--threads", "5"], {"threads": 5}),
}
LEARN |= {name: (words, {f"spec.{k.removeprefix('suite.')}": v for k, v in told.items()}) for name, (words, told) in
          RUNNING.items() if any(key.startswith(ADAPT) for key in told)}  # fmt: skip
WEIGHT = {"weight": (["--weight", "C"], {"spec.weight": "C"})}
LOSS = {"loss": (["--loss", "ipo"], {"spec.overrides.loss": "ipo"})}
OVER = {
    "out": (["--out", "X"], {"out": "X"}),
    "task": (["--task", "translation"], {"task": "translation"}),
    "pairs": (["--pairs", "4", "8"], {"settings.pairs.0": 4, "settings.pairs.1": 8, "settings.pairs.2": None}),
    "algorithm": (["--algorithm", "rloo"], {"settings.algorithm": "rloo"}),
    "iterations": (["--iterations", "7"], {"settings.iterations": 7}),
    "set": (["--set", "epochs=3"], {"settings.overrides.epochs": 3}),
    "seed": (["--seed", "21"], {"settings.seed": 21}),
}
BASE = {
    "train": ["train", "--task", "reviews", "--algorithm", "ppo", "--out", "OUT"],
    "compare": ["compare", "--task", "reviews", "--algorithms", "ppo", "--out", "OUT"],
    "own": ["train", *CUSTOM, "--algorithm", "ppo", "--out", "OUT"],
    "sft": ["sft", "--model", "M", "--data", "D", "--out", "OUT"],
    "reward-model": ["reward-model", "--model", "M", "--data", "D", "--out", "OUT"],
    "dpo": ["dpo", "--model", "M", "--data", "D", "--out", "OUT"],
    "overoptimise": ["overoptimise", "--out", "OUT"],
}
TABLES = {"train": TRAIN, "compare": COMPARE, "own": OWN, "sft": LEARN, "reward-model": LEARN | WEIGHT}
TABLES |= {"dpo": LEARN | WEIGHT | LOSS, "overoptimise": OVER}
COMMANDS = {"train": train.Train, "compare": compare.Compare, "sft": learn.Sft, "reward-model": learn.RewardModel}
COMMANDS |= {"dpo": learn.Dpo, "overoptimise": overoptimize.Overoptimise}


@pytest.fixture
def arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that gives what a command would carry out."""
    monkeypatch.chdir(tmp_path)
    for name in ("FILE", "OTHER"):
        Path(name).write_text('{"prompt": "p"}\n')
    seen: list[Any] = []

    def running(suite: Any, out: Path, **more: Any) -> None:
        seen.append({"suite": asdict(suite), "out": str(out), **{k: v for k, v in more.items() if k != "console"}})

    def learning(spec: Any, out: Path, **more: Any) -> None:
        seen.append({"spec": asdict(spec), "out": str(out), **{k: v for k, v in more.items() if k != "console"}})

    def over(task: str, options: dict[str, Any], settings: Any, out: Path, say: Any) -> list[Any]:
        seen.append({"task": task, "options": options, "settings": asdict(settings), "out": str(out)})
        return []

    monkeypatch.setattr(train, "carry_out", running)
    monkeypatch.setattr(compare, "carry_out", running)
    monkeypatch.setattr(learn, "learn_from_data", learning)
    monkeypatch.setattr(overoptimization, "overoptimise", over)

    def run(*words: str) -> dict[str, Any]:
        seen.clear()
        main(list(words))
        (found,) = seen
        return found

    return run


def indexed(value: Any) -> Any:
    """Lists as dictionaries by place, so that their entries can be told apart."""
    if isinstance(value, dict):
        return {key: indexed(each) for key, each in value.items()}
    return {str(k): indexed(each) for k, each in enumerate(value)} if isinstance(value, tuple) else value


def leaves(value: Any, where: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {
            k: v for name, each in value.items() for k, v in leaves(each, f"{where}.{name}" if where else name).items()
        }
    return {where: value}


APART = ("ray", "extend", "episodes", "compile", "recompute", "epochs")  # excludes another, or is a flag beside one
GROUPS = [(command, apart) for command in TABLES for apart in (False, True)]


@pytest.mark.parametrize(("command", "apart"), GROUPS, ids=str)
def test_options_arrive_where_they_belong(arrived: Any, command: str, apart: bool) -> None:
    """All at a time, each with a value of its own."""
    chosen = [each for name, each in TABLES[command].items() if each[0] and (name in APART) == apart]
    rest, more, told = list(BASE[command]), [], {}
    before = leaves(indexed(arrived(*rest)))
    for words, expected in chosen:
        more, told = more + words, told | expected
        if words[0] in rest:
            place = rest.index(words[0])
            del rest[place : place + 2]
    after = leaves(indexed(arrived(*rest, *more)))
    changed = {key: after.get(key) for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    filled = {key for key in changed if before.get(key) == {} and any(name.startswith(key) for name in told)}
    assert {key: value for key, value in changed.items() if key not in filled} == told


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_is_left_out(command: str) -> None:
    def names(kind: Any) -> set[str]:
        found = set()
        for field in fields(kind):
            value = field.default
            found |= names(value) if is_dataclass(value) else {field.name}
        return found

    known = set(TABLES[command]) | (set() if command in ("sft", "reward-model", "dpo") else set(OWN))
    assert names(COMMANDS[command]) - {"processes", "fsdp"} == known  # which decide how the command is started


def test_sources_of_ones_own(arrived: Any) -> None:
    for option, task in (("--corpus", "corpus"), ("--parallel", "translation")):
        found = arrived("train", option, "FILE", "--algorithm", "ppo", "--out", "OUT")["suite"]["tasks"]
        assert [(each["name"], each["options"]) for each in found] == [(task, {"path": "FILE"})]
        found = arrived("overoptimise", "--task", task, option, "FILE", "--out", "OUT")
        assert (found["task"], found["options"]) == (task, {"path": "FILE"})
    words = ["--policy", "P", "--prompts", "FILE", "--reward", "bleu*0.5", "--reward", "chrf", "--algorithm", "ppo"]
    (task,) = arrived("train", *words, "--out", "OUT")["suite"]["tasks"]
    assert task["options"] == {"policy": "P", "prompts": "FILE", "reward": ["bleu*0.5", "chrf"]}


SUITE = """
tasks = ["reviews", "translation"]
algorithms = ["ppo", "sft", "rloo"]
seeds = [5, 6]
budget = { episodes = 64 }
adaptation = { lora_rank = 4, lora_alpha = 9.0 }
[algorithm.ppo]
epochs = 2
clip = 0.1
[task.reviews]
kl_coef = 0.3
temperature = 0.75
algorithms = ["rloo", "ppo"]
"""


def test_a_suite_and_what_comes_on_top_of_it(arrived: Any) -> None:
    Path("s.toml").write_text(SUITE)
    words = ["--algorithms", "sft", "ppo", "--iterations", "3", "--set", "ppo.epochs=7", "--env", "kl_coef=0.5"]
    words += ["--lora-alpha", "2.5", "--seeds", "8", "7", "--parallel", "FILE"]
    found = arrived("compare", "--suite", "s.toml", *words, "--out", "OUT")["suite"]
    assert (found["plan"]["iterations"], found["plan"]["episodes"]) == (3, None)
    assert found["overrides"] == {"ppo": {"epochs": 7, "clip": 0.1}}
    assert found["adaptation"] == {"lora_rank": 4, "lora_alpha": 2.5}
    reviews, translation = found["tasks"]
    assert (reviews["env"], translation["env"]) == ({"kl_coef": 0.5, "temperature": 0.75}, {"kl_coef": 0.5})
    runs = [(run.task, run.seed, run.algorithm) for run in load_suite("s.toml").runs()]
    assert runs[:5] == [("reviews", s, a) for s in (5, 6) for a in ("rloo", "ppo")] + [("translation", 5, "ppo")]
    assert reviews["algorithms"] == ("ppo",) and translation["algorithms"] in (None, ("sft", "ppo"))
    assert found["seeds"] == (8, 7) and found["algorithms"] == ("sft", "ppo")


def test_a_report_is_of_its_folder_and_its_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(report, "show", lambda *given: seen.append(given))
    main(["report", str(tmp_path), "--people", "S", "--show"])
    assert seen == [(tmp_path, Path("S"), True)]
