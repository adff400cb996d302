"""Comparisons from several folders: what counts once, what is refused, what the result is."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.merge import merge
from lm_envs.benchmarks.run.storage import finished, write_json, write_sealed
from lm_envs.files import write_manifest
from tests.benchmarks.run.test_results import result

PLAN = {"iterations": 5, "test_prompts": 2, "validation_prompts": 2}


def run(out: Path, algorithm: str, seed: int, gold: float, *, agent=None, inputs=None, **given) -> Path:
    """A finished run as one_run leaves it, its results chosen."""
    row = result(algorithm, seed, gold, 1.0, [1.0, 0.0], golds=[gold, gold], prompts=2)
    folder = out / "reviews" / algorithm / f"seed-{seed}"
    (folder / "checkpoints" / "checkpoint-000005").mkdir(parents=True)
    config = {"agent": agent, "inputs": inputs or {}, "versions": {"torch": "2"}, "threads": 1}
    config |= {name: given.pop(name) for name in ("versions", "threads") if name in given}
    own = {"env": {}, "options": {}, "overrides": {}, "plan": PLAN} | given
    config["run"] = {"task": "reviews", "algorithm": algorithm, "seed": seed, **own}
    write_sealed(folder / "config.json", config)
    write_json(folder / "result.json", row)
    sample = {"split": "test", "prompt": "p", "response": f"{algorithm} {seed} {gold}", "finish_reason": "stop"}
    (folder / "samples.jsonl").write_text(json.dumps(sample | {"gold": gold, "proxy": 0.0, "kl": 1.0}) + "\n")
    (folder / "metrics.jsonl").write_text("")
    write_manifest(folder, {}, [folder / name for name in ("config.json", "result.json", "samples.jsonl")])
    return folder


def folder(out: Path, algorithms=("sft", "ppo"), seeds=(0,), match_kl=()) -> Path:
    out.mkdir(exist_ok=True)
    suite = {"name": out.name, "algorithms": list(algorithms), "seeds": list(seeds), "match_kl": list(match_kl)}
    write_sealed(out / "comparison.json", suite | {"tasks": [{"name": "reviews"}]})
    for algorithm in algorithms:
        for seed in seeds:
            run(out, algorithm, seed, 0.1 * seed + len(algorithm), agent=None if algorithm == "sft" else {"lr": 1})
    return out


def test_two_days_make_one_comparison(tmp_path):
    a = folder(tmp_path / "a", ("sft", "ppo"), (0, 1), [2.0])
    b = folder(tmp_path / "b", ("sft", "rloo"), (1, 2), [1.0, 2.0])
    assert merge([a, b], tmp_path / "both") == ["1 run that an earlier folder holds too: counted once"]
    held = json.loads((tmp_path / "both" / "comparison.json").read_text())
    assert held["name"] == "a + b" and held["algorithms"] == ["sft", "ppo", "rloo"] and held["seeds"] == [0, 1, 2]
    assert held["match_kl"] == [1.0, 2.0] and [task["name"] for task in held["tasks"]] == ["reviews"]
    main(["report", str(tmp_path / "both")])
    rows = list(csv.DictReader((tmp_path / "both" / "results.csv").open()))
    found = [(row["algorithm"], row["seed"]) for row in rows]
    assert found == [("sft", "0"), ("sft", "1"), ("sft", "2"), ("ppo", "0"), ("ppo", "1"), ("rloo", "1"), ("rloo", "2")]
    moved = tmp_path / "both" / "reviews" / "ppo" / "seed-1"
    assert finished(moved) is not None and not (moved / "checkpoints").exists()
    assert (a / "reviews" / "ppo" / "seed-1" / "checkpoints").exists()


def test_one_run_under_two_names_counts_once(tmp_path):
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b", ("sft",))
    same = run(b, "my-ppo", 0, 3.0, agent={"lr": 1})
    shutil.copy(a / "reviews" / "ppo" / "seed-0" / "samples.jsonl", same / "samples.jsonl")
    write_manifest(same, {}, [same / name for name in ("config.json", "result.json", "samples.jsonl")])
    notes = merge([a, b], tmp_path / "both")
    assert any("my-ppo/seed-0 is the same run as" in note and "counts once" in note for note in notes)
    assert not (tmp_path / "both" / "reviews" / "my-ppo").exists()
    # Two seeds, or two settings, that answered alike are two runs.
    for name, seed, agent in (("my-ppo", 5, {"lr": 1}), ("your-ppo", 0, {"lr": 2})):
        alike = run(b, name, seed, 3.0, agent=agent)
        shutil.copy(a / "reviews" / "ppo" / "seed-0" / "samples.jsonl", alike / "samples.jsonl")
        write_manifest(alike, {}, [alike / name for name in ("config.json", "result.json", "samples.jsonl")])
    # Untrained methods may well answer alike: SFT and a best-of-1 are two methods.
    twin = run(b, "best-of-1", 0, 3.0)
    shutil.copy(a / "reviews" / "sft" / "seed-0" / "samples.jsonl", twin / "samples.jsonl")
    write_manifest(twin, {}, [twin / name for name in ("config.json", "result.json", "samples.jsonl")])
    merge([a, b], tmp_path / "again")
    kept = {path.parent.name + path.name for path in (tmp_path / "again" / "reviews").glob("*/*")}
    assert kept == {"sftseed-0", "pposeed-0", "my-pposeed-5", "your-pposeed-0", "best-of-1seed-0"}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"overrides": {"kl_coef": 0.5}},
            "a/.* and .*b/.* are different runs of one name: overrides.kl_coef: None and 0.5",
        ),
        ({"inputs": {"algorithm 'ppo'": "other"}}, "different runs of one name: inputs.algorithm 'ppo'"),
        ({}, "equal settings, other results"),
    ],
)
def test_runs_of_one_name_that_differ_are_named(tmp_path, changes, message):
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b", ())
    run(b, "ppo", 0, 7.0, agent={"lr": 1}, **changes)
    with pytest.raises(UserError, match=message):
        merge([a, b], tmp_path / "both")
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"env": {"temperature": 0.5}}, r"measured differently: env.temperature: None in .*sft/seed-0, 0.5 in"),
        ({"plan": PLAN | {"test_prompts": 9}}, "plan.test_prompts: 2 in .*, 9 in"),
        ({"plan": PLAN | {"validation_prompts": 9}}, "plan.validation_prompts: 2 in .*, 9 in"),
        ({"plan": PLAN | {"split": "validation"}}, "plan.split: 'test' in .*, 'validation' in"),
        ({"options": {"policy": "x"}}, "options.policy"),
        ({"inputs": {"policy 'x'": "hash"}}, "inputs.policy"),
    ],
)
def test_tasks_that_were_measured_otherwise_are_refused(tmp_path, changes, message):
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b", ())
    run(b, "rloo", 0, 7.0, agent={"lr": 1}, **changes)
    with pytest.raises(UserError, match=message):
        merge([a, b], tmp_path / "both")


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("plan.iterations", {"plan": PLAN | {"iterations": 50}}),
        ("versions.torch", {"versions": {"torch": "3"}}),
        ("threads", {"threads": 2}),
    ],
)
def test_other_conditions_are_told(tmp_path, what, changes):
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b", ())
    run(b, "rloo", 0, 7.0, agent={"lr": 1}, **changes)
    (told,) = merge([a, b], tmp_path / "both")
    assert told.startswith(f"runs of reviews differ, so numbers may too: {what}: ")
    assert f" in {a}" in told and told.endswith(f" in {b / 'reviews' / 'rloo' / 'seed-0'}")


def test_what_the_command_says(tmp_path, capsys):
    def refused(*words) -> str:
        with pytest.raises(SystemExit):
            main(["report", *map(str, words)])
        return capsys.readouterr().err

    a, b = folder(tmp_path / "a"), folder(tmp_path / "b", ("rloo",))
    assert "say where with --out" in refused(a, b)
    assert "say which comparison" in refused()
    main(["report", str(a), str(b), "--out", str(tmp_path / "both")])
    assert (tmp_path / "both" / "report.html").exists() and "rloo" in capsys.readouterr().out
    assert "is not empty" in refused(a, b, "--out", tmp_path / "both")
    (tmp_path / "empty").mkdir()
    assert "holds no finished run" in refused(a, tmp_path / "empty", "--out", tmp_path / "c")
    assert "no such folder" in refused(a, tmp_path / "nowhere", "--out", tmp_path / "c")


def test_a_merge_that_fails_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b", ("rloo",))
    real, seen = shutil.copytree, []

    def full(source, *rest, **options):
        seen.append(source)
        if len(seen) == 3:
            raise OSError(28, "No space left on device")
        return real(source, *rest, **options)

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(OSError, match="No space"):
        merge([a, b], tmp_path / "both")
    assert not list((tmp_path / "both").iterdir())
    monkeypatch.setattr(shutil, "copytree", real)
    merge([a, b], tmp_path / "both")
    assert (tmp_path / "both" / "comparison.json").exists()
