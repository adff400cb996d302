"""``saved:DIR`` in a comparison: a model that was trained before, measured beside the others."""

import json
import shutil

import pytest

from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.run.inputs import fingerprints
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from tests.lm_envs import byo

MEASURED = ("win_rate", "gold", "proxy", "kl", "length", "distinct_2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of RLOO, beside its parts."""
    root = tmp_path_factory.mktemp("saved")
    byo.make(root)
    compare(root, root / "run", "rloo", "--set", "rloo.learning_rate=3e-2", "--set", "rloo.episodes=8")
    return root / "run/custom/rloo/seed-0"


def compare(parts, out, *more):
    names = {"policy": "policy", "reward-model": "reward_model", "judge": "judge", "prompts": "prompts.jsonl"}
    given = [word for option, name in names.items() for word in (f"--{option}", str(parts / name))]
    small = ("--iterations", "2", "--test-prompts", "8", "--threads", "1")
    main(["compare", *given, *small, "--out", str(out), "--algorithms", *more])


def test_a_saved_model_has_the_results_of_the_run_that_left_it(trained, tmp_path):
    compare(trained.parents[3], tmp_path / "again", "sft", f"saved:{trained / 'model'}")
    (found,) = (tmp_path / "again/custom").glob("saved*/seed-0/result.json")
    before, after = (json.loads(path.read_text()) for path in (trained / "result.json", found))
    assert {name: after[name] for name in MEASURED} == pytest.approx({name: before[name] for name in MEASURED})
    assert after["kl"] > 0.01
    assert (tmp_path / "again/report.html").exists()


def test_its_weights_are_an_input(trained, tmp_path):
    copied = shutil.copytree(trained / "model", tmp_path / "model")
    spec = RunSpec("custom", f"saved:{copied}", 0, Plan())
    before = fingerprints(spec)
    assert len(before) == 1
    (copied / "config.json").write_text("{}")
    assert fingerprints(spec) != before


def test_another_tokenizer_is_refused(trained, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(trained / "model", other)
    made = json.loads((other / "tokenizer.json").read_text())
    made["model"]["vocab"]["elsewhere"] = len(made["model"]["vocab"])
    (other / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(SystemExit):
        compare(trained.parents[3], tmp_path / "no", f"saved:{other}")
    assert "its tokenizer is not that of the task's policy" in capsys.readouterr().err.replace("\n", " ")


def test_a_place_without_a_model_is_told_before_the_task_is_opened(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "lm_envs.benchmarks.run.problems.load", lambda *given, **options: pytest.fail("the task was opened")
    )
    with pytest.raises(SystemExit):
        compare(trained.parents[3], tmp_path / "no", "sft", f"saved:{tmp_path / 'nowhere'}")
    assert "there is no such folder" in capsys.readouterr().err.replace("\n", " ")
