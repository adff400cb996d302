"""TensorBoard and other trackers show every iteration once, whatever was killed and resumed."""

from __future__ import annotations

import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run import tracking
from lm_envs.benchmarks.run.compare import compare
from lm_envs.benchmarks.run.one_run import _Run, execute
from lm_envs.benchmarks.run.storage import Records
from lm_envs.benchmarks.run.suites import Plan, RunSpec, Suite, TaskSettings
from lm_envs.benchmarks.run.tracking import TensorBoard, scalars_of
from tests.benchmarks.fake_task import NAME


def log(folder, iterations, value, resumed_at=0):
    tracker = TensorBoard(folder, resumed_at)
    for iteration in iterations:
        tracker.scalars({"kl": value, "validation_gold": -value}, iteration)
    tracker.close()


@pytest.mark.parametrize("resumed_at", [0, 2])
def test_a_resumed_run_shows_no_step_twice(tmp_path, resumed_at):
    log(tmp_path, range(5), 1.0)
    first = 0 if resumed_at == 0 else resumed_at + 1
    log(tmp_path, range(first, 5), 2.0, resumed_at)
    log(tmp_path, range(first, 7), 3.0, resumed_at)
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    found = [(event.step, event.value) for event in read.Scalars("main/kl")]
    assert found == [(step, 1.0 if step < first else 3.0) for step in range(7)]
    assert [event.value for event in read.Scalars("validation/gold")] == [-value for _, value in found]


class Service:
    """Stands in for a tracker's package: keeps what it is told, and can be made to fail."""

    def __init__(self) -> None:
        self.opened, self.steps, self.ended, self.broken = [], [], [], False

    def __call__(self, label, config, known, folder):
        if self.broken == "start":
            raise ConnectionError("no network\nat all")
        self.opened.append((label, known, config["run"]["seed"]))
        return known or "run-1", self.log, self.ended.append

    def log(self, scalars, step):
        if self.broken:
            raise ConnectionError("gone")
        self.steps.append((step, scalars))


@pytest.fixture
def service(monkeypatch) -> Service:
    made = Service()
    monkeypatch.setitem(tracking._OPEN, "wandb", made)
    return made


PLAN = Plan(iterations=12, test_prompts=4, validation_prompts=4, validate_every=3, checkpoint_every=2)
RUN = RunSpec(NAME, "reinforce", 0, PLAN, overrides={"episodes": 8})


def records(out):
    return Records(out / RUN.label / "metrics.jsonl").read()


def test_a_service_gets_every_iteration_once_whatever_was_killed(tmp_path, service, monkeypatch):
    """Killed in iteration 4, after the records of iteration 3, which no checkpoint holds, were written."""
    record = _Run._record

    def dies(self, problem, tracker, metrics):
        if metrics["iteration"] == 4:
            raise KeyboardInterrupt
        record(self, problem, tracker, metrics)

    monkeypatch.setattr(_Run, "_record", dies)
    with pytest.raises(KeyboardInterrupt):
        execute(RUN, tmp_path, track=["wandb"])
    assert [step for step, _ in service.steps] == [0, 1, 2] and len(records(tmp_path)) == 4
    assert service.ended == [{}]
    monkeypatch.setattr(_Run, "_record", record)
    result = execute(RUN, tmp_path, track=["wandb"])
    assert [step for step, _ in service.steps] == list(range(13))
    assert service.opened == [(RUN.label, None, 0), (RUN.label, "run-1", 0)]  # the same run at the service
    found = dict(service.steps)
    for each in records(tmp_path):
        assert found[each["iteration"]] == scalars_of(each)
    assert found[3]["main/kl"] == records(tmp_path)[3]["kl"] and "validation/gold" in found[3]
    assert "validation/gold" not in found[2] and found[5]["counters/tokens"] == records(tmp_path)[5]["tokens"]
    assert service.ended[1]["result/gold"] == result["gold"] and len(service.ended) == 2
    execute(RUN, tmp_path, track=["wandb"])  # finished: nothing to tell
    assert len(service.opened) == 2


def test_a_service_that_fails_costs_nothing(tmp_path, service):
    service.broken = True
    with pytest.warns(UserWarning, match="wandb no longer follows this run: gone"):
        execute(RUN, tmp_path / "a", track=["wandb"])
    execute(RUN, tmp_path / "b")
    assert [r["tokens"] for r in records(tmp_path / "a")] == [r["tokens"] for r in records(tmp_path / "b")]
    service.broken = "start"
    with pytest.raises(UserError, match="--track wandb: no network"):
        execute(RUN, tmp_path / "c", track=["wandb"])
    assert not records(tmp_path / "c")


def test_a_package_that_is_missing_is_named_first(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lm-envs\[trackio\]'"):
        compare(Suite("x", (TaskSettings(NAME),), ("reinforce",)), tmp_path / "out", track=["trackio"])
    assert not (tmp_path / "out").exists()


def test_the_option_reaches_the_runs(tmp_path, service, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: True)
    words = ["--task", NAME, "--iterations", "1", "--track", "wandb", "--out"]
    main(["train", *words, str(tmp_path / "a"), "--algorithm", "reinforce", "--set", "episodes=8"])
    main(["compare", *words, str(tmp_path / "b"), "--algorithms", "sft", "--test-prompts", "4"])
    assert [label.split("/")[1] for label, *_ in service.opened] == ["reinforce", "sft"]
    assert "result/gold" in service.ended[1]  # an untrained method too


def test_every_number_has_its_place_and_step(tmp_path):
    tracker = TensorBoard(tmp_path)
    tracker.scalars({"gold": 0.5, "tokens": 7, "clip_fraction": 0.25, "kl": math.nan, "iteration": 3, "x": "y"}, 3)
    tracker.scalars({"validation_gold": 0.75, "wall_s": 9}, 4)
    tracker.texts(["a\nb", "c"], 4, "training")
    tracker.texts([], 4, "nothing")
    tracker.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]} == {
        "main/gold": [(3, 0.5)],
        "counters/tokens": [(3, 7.0)],
        "update/clip_fraction": [(3, 0.25)],
        "validation/gold": [(4, 0.75)],
        "counters/wall_s": [(4, 9.0)],
    }
    (tag,) = read.Tags()["tensors"]
    (event,) = read.Tensors(tag)
    assert tag == "training/text_summary" and event.step == 4
    assert event.tensor_proto.string_val == [b"    a b\n    c"]  # a line each, as a block of Markdown
