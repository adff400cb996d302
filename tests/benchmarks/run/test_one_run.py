"""Law 10: a run that was killed and resumed ends with the same weights as one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.errors import Interrupted, UserError
from lm_envs.benchmarks.run import one_run
from lm_envs.benchmarks.run.one_run import settings_of
from lm_envs.benchmarks.run.problems import TextProblem
from lm_envs.benchmarks.run.storage import Checkpoints, Records
from lm_envs.benchmarks.run.suite_files import load_suite
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from tests.benchmarks.fake_task import NAME
from tests.house import CHECKOUT
from tests.lm_envs import byo

execute = partial(one_run.execute, keep=1)  # their last checkpoints are compared

PLAN = Plan(iterations=8, test_prompts=8, validation_prompts=8, validate_every=2, checkpoint_every=2)
# A steered coefficient, value clipping and several epochs: much state that a checkpoint could forget.
SETTINGS = {"episodes": 16, "epochs": 2, "minibatches": 2, "kl_target": 0.5, "kl_horizon": 100, "learning_rate": 1e-2}
SUITE = """
tasks = ["{name}"]
algorithms = ["ppo"]
budget = {{ iterations = {iterations} }}
evaluation = {{ test_prompts = 8, validation_prompts = 8, every = 2 }}
checkpoints = {{ every = {every}, keep = 1 }}
[algorithm.ppo]
{settings}
[task."{name}"]
options = {{ {options} }}
"""


def spec(**changes) -> RunSpec:
    return RunSpec(**{"task": NAME, "algorithm": "ppo", "seed": 0, "plan": PLAN, "overrides": SETTINGS, **changes})


def final(out: Path, run: RunSpec | None = None) -> bytes:
    """The last checkpoint's tensors, to the byte."""
    folder = out / (run or spec()).label / "checkpoints"
    return (Checkpoints(folder).paths()[-1] / "tensors.safetensors").read_bytes()


def lasting(out: Path) -> list[list[dict]]:
    """What the run recorded, without what depends on the clock."""
    folder = out / spec().label
    return [
        [{k: v for k, v in record.items() if not k.endswith(("_s", "per_second"))} for record in Records(path).read()]
        for path in (folder / "metrics.jsonl", folder / "samples.jsonl")
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    execute(spec(), out)
    return out


def write_suite(tmp_path: Path, *, iterations: int = 8, every: int = 2, **options) -> Path:
    path = tmp_path / "suite.toml"
    text = SUITE.format(
        name=NAME,
        iterations=iterations,
        every=every,
        settings="\n".join(f"{k} = {v}" for k, v in SETTINGS.items()),
        options=", ".join(f"{k} = {json.dumps(v)}" for k, v in options.items()),
    )
    path.write_text(text)
    return path


def start(suite: Path, out: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "lm_envs.benchmarks.cli", "compare", "--suite", str(suite), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--threads", "1", *more],
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process: subprocess.Popen, seconds: float = 90, pause: float = 0.01) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"the run ended by itself: {process.communicate()[0]}")
        assert time.monotonic() < deadline, "nothing to be killed appeared"
        if pause:
            time.sleep(pause)


def resume(suite: Path, out: Path) -> None:
    """What the command does with --resume, less the report."""
    execute(load_suite(suite).runs()[0], out)


@pytest.mark.parametrize(
    ("moment", "at"),
    [("reward", 10), pytest.param("judge", 7, marks=pytest.mark.slow)],
    ids=["during an iteration", "between two iterations"],
)
def test_killed_and_resumed_is_the_same_run(tmp_path, whole, moment, at):
    # Calls: three to try out, two at iteration 0 (of the policy's samples, and of SFT's to compare with), then one of
    # the reward per iteration and one of both per validation. So iteration 4 is under way, or its validation is; the
    # last checkpoint is of iteration 2.
    mark, out = tmp_path / "mark", tmp_path / "out"
    suite = write_suite(tmp_path, pause=moment, mark=str(mark), at=at)
    process = start(suite, out)
    wait_for(mark.exists, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    records = Records(out / spec().label / "metrics.jsonl")
    assert records.read()[-1]["iteration"] == 3
    assert Checkpoints(out / spec().label / "checkpoints").newest().iteration == 2
    resume(suite, out)
    assert final(out) == final(whole)
    assert lasting(out) == lasting(whole)


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(tmp_path):
    out = tmp_path / "out"
    suite = write_suite(tmp_path, iterations=24, every=1)
    folder = out / spec().label / "checkpoints"
    process = start(suite, out)

    def writing() -> bool:
        return Checkpoints(folder).paths() != [] and any(folder.glob(".tmp-*"))

    for _ in range(8):
        wait_for(writing, process, pause=0)
        process.send_signal(signal.SIGSTOP)  # look again while it cannot finish
        if any(folder.glob(".tmp-*-checkpoint-*")):
            break
        process.send_signal(signal.SIGCONT)
    else:
        pytest.fail("never met a checkpoint half written")
    process.kill()
    process.wait()
    assert any(folder.glob(".tmp-*")), "the kill came too late"
    done = Checkpoints(folder).newest().iteration
    assert done < 24
    resume(suite, out)
    assert not any(folder.glob(".tmp-*"))
    run = spec(plan=Plan(24, None, 8, 8, 2, 1))
    execute(run, tmp_path / "whole")
    assert final(out) == final(tmp_path / "whole")


class StopAfter:
    """Asks to stop after some iterations."""

    def __init__(self, iterations: int) -> None:
        self.left = iterations

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def test_stopped_between_checkpoints_and_continued(tmp_path, whole):
    with pytest.raises(Interrupted):
        execute(spec(), tmp_path, should_stop=StopAfter(3))
    assert Checkpoints(tmp_path / spec().label / "checkpoints").newest().iteration == 3
    execute(spec(), tmp_path)
    assert final(tmp_path) == final(whole)
    assert lasting(tmp_path) == lasting(whole)


@pytest.mark.parametrize("forgotten", ["adam.", "policy.value_head", "kl_coef"])
def test_negative_control_a_checkpoint_that_forgets_something_is_noticed(tmp_path, whole, forgotten):
    with pytest.raises(Interrupted):
        execute(spec(), tmp_path, should_stop=StopAfter(4))
    folder = tmp_path / spec().label
    checkpoints = Checkpoints(folder / "checkpoints", (settings_of(folder)["sha256"],))
    found = checkpoints.newest()
    tensors = {
        name: tensor if "value_head" not in forgotten or not name.startswith(forgotten) else tensor * 0
        for name, tensor in found.tensors.items()
        if not (forgotten == "adam." and name.startswith(forgotten))
    }
    if forgotten == "kl_coef":
        assert found.state["agent"]["kl_coef"] != pytest.approx([0.05, 0.05])
        found.state["agent"]["kl_coef"] = [0.05, 0.05]
    checkpoints.save(found.iteration, tensors, found.state)
    execute(spec(), tmp_path)
    assert final(tmp_path) != final(whole)


def test_a_damaged_checkpoint_costs_time_and_nothing_else(tmp_path, whole):
    with pytest.raises(Interrupted):
        execute(spec(), tmp_path, should_stop=StopAfter(6))
    newest = Checkpoints(tmp_path / spec().label / "checkpoints").paths()[-1]
    (newest / "tensors.safetensors").write_bytes(b"rubbish")
    with pytest.warns(RuntimeWarning, match="checkpoint-000006 is damaged"):
        execute(spec(), tmp_path)
    assert final(tmp_path) == final(whole)
    assert lasting(tmp_path) == lasting(whole)


def test_every_iteration_is_recorded_once_with_the_learning_curve(whole):
    metrics, samples = lasting(whole)
    assert [record["iteration"] for record in metrics] == list(range(9))
    assert [r["iteration"] for r in metrics if "validation_gold" in r] == [0, 2, 4, 6, 8]
    assert metrics[0]["validation_kl"] == pytest.approx(0, abs=1e-5)
    wanted = {"score", "kl", "kl_coef", "entropy", "ratio", "clip_fraction", "explained_variance", "length", "return"}
    assert wanted <= set(metrics[-1])
    assert len({record["kl_coef"] for record in metrics[1:]}) > 1
    assert sum(s["split"] == "test" for s in samples) == 8
    assert {s["iteration"] for s in samples if s["split"] == "validation"} == {0, 2, 4, 6, 8}


def test_event_files_hold_what_people_look_for(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / spec().label / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    main_tags = {f"main/{n}" for n in ("return", "score", "kl", "entropy", "length", "tokens_per_second", "kl_coef")}
    assert main_tags | {"validation/gold", "validation/proxy", "validation/kl"} <= tags
    assert {"update/ratio", "update/clip_fraction", "update/explained_variance"} <= tags
    assert {"validation/text_summary", "training/text_summary"} <= set(events.Tags()["tensors"])
    assert [e.step for e in events.Scalars("main/score")] == list(range(1, 9))


def test_finished_runs_are_not_run_again_and_other_settings_are_refused(whole):
    before = (whole / spec().label / "result.json").stat().st_mtime_ns
    execute(spec(), whole)
    assert (whole / spec().label / "result.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"other settings \(overrides.clip: None before, 0.3 now\)"):
        execute(spec(overrides={**SETTINGS, "clip": 0.3}), whole)


@pytest.mark.parametrize("name", ["result.json", "samples.jsonl", "model/model.safetensors"])
def test_a_finished_run_that_was_damaged_is_made_again(tmp_path, name):
    run = spec(plan=Plan(2, None, 8, 8, 0, 20), overrides={"episodes": 8, "epochs": 1})
    first = execute(run, tmp_path)
    path = tmp_path / run.label / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + b"12345678\n")
    with pytest.warns(UserWarning, match=f"{name} was damaged after the run was finished"):
        again = execute(run, tmp_path)
    assert {k: v for k, v in again.items() if not k.endswith("_s")} == {
        k: v for k, v in first.items() if not k.endswith("_s")
    }
    assert name == "result.json" or path.read_bytes() == whole


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, whole):
    out = tmp_path / "out"
    suite = write_suite(tmp_path)
    process = start(suite, out)
    metrics = Records(out / spec().label / "metrics.jsonl")
    wait_for(lambda: len(metrics.read()) > 3, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "--resume" in said and "Traceback" not in said
    assert not (out / spec().label / "result.json").exists()
    assert Checkpoints(out / spec().label / "checkpoints").newest().iteration == metrics.read()[-1]["iteration"]
    main(["compare", "--suite", str(suite), "--out", str(out), "--resume", "--threads", "1"])
    assert final(out) == final(whole)
    assert (out / "results.csv").read_text().splitlines()[1].startswith(f"{NAME},ppo,0,")
    assert (out / "report.html").exists()


@pytest.mark.slow
def test_ctrl_c_with_workers_saves_every_run(tmp_path):
    out, suite = tmp_path / "out", write_suite(tmp_path, iterations=400)
    suite.write_text(suite.read_text().replace('algorithms = ["ppo"]', 'algorithms = ["ppo", "a2c"]'))
    process = start(suite, out, "--jobs", "2")
    records = [Records(out / spec(algorithm=name).label / "metrics.jsonl") for name in ("ppo", "a2c")]
    wait_for(lambda: all(len(record.read()) > 3 for record in records), process, pause=0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and said.count("stopped, saved") == 2 and "--resume" in said, said
    for record in records:
        saved = Checkpoints(record.path.parent / "checkpoints").newest()
        assert saved.iteration == record.read()[-1]["iteration"]


def test_a_folder_in_use_names_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(one_run, "_WAIT_FOR_OTHER_S", 0)
    caught = []

    def intrude() -> bool:
        with pytest.raises(
            UserError, match=f"process {os.getpid()} on .* is at work in .*: wait for it, or end it"
        ) as e:
            execute(spec(), tmp_path)
        caught.append(e)
        return True

    with pytest.raises(Interrupted):
        execute(spec(), tmp_path, should_stop=intrude)
    assert len(caught) == 1


def test_a_run_of_few_iterations_has_a_learning_curve_too(tmp_path):
    run = spec(plan=Plan(9, None, 8, 8, 10, 20), overrides={"episodes": 8, "epochs": 1})
    execute(run, tmp_path)
    records = Records(tmp_path / run.label / "metrics.jsonl").read()
    assert [r["iteration"] for r in records if "validation_gold" in r] == [0, 2, 4, 6, 8, 9]  # 9 // 4, and the last
    silent = spec(plan=Plan(2, None, 8, 8, 0, 20), overrides={"episodes": 8, "epochs": 1}, seed=1)
    execute(silent, tmp_path)
    assert not any("validation_gold" in r for r in Records(tmp_path / silent.label / "metrics.jsonl").read())


def test_room_is_checked_for_the_responses_that_the_env_will_have(tmp_path):
    """`--env max_new_tokens` decides, not the task's own number."""
    made = {"task": "custom", "algorithm": "ppo", "seed": 0, "plan": Plan(iterations=1, test_prompts=2)}
    options = {**byo.make(tmp_path).options, "samples": 4, "max_new_tokens": 47}
    with pytest.raises(ValueError, match="responses up to 47, together more than the model's context of 48"):
        TextProblem(RunSpec(**made, options=options))
    problem = TextProblem(RunSpec(**made, options=options, env={"max_new_tokens": 6}))
    assert problem.task.max_new_tokens == problem.env.mdp.max_new_tokens == 6
    with pytest.raises(ValueError, match="responses up to 47, together"):
        TextProblem(RunSpec(**made, options=options | {"max_new_tokens": 6}, env={"max_new_tokens": 47}))
