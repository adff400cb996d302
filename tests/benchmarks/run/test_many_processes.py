"""A command by several processes is the command by one, however often it is killed; one line says why it ended."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lm_envs.benchmarks.errors import UserError, explain
from lm_envs.benchmarks.run.many_processes import carry_out, places
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from lm_envs.benchmarks.run.workers import Event, StopRequest, run_in_workers
from lm_envs.processes import group
from tests.benchmarks.commands.test_learn import make
from tests.house import CHECKOUT

REWARD = """
import os, time
calls = 0

def length(prompts, completions, **columns):
    time.sleep(float(os.environ.get("SLOW", 0)))
    return [0.05 * len(text) for text in completions]

def other(how, completions):
    global calls
    calls += 1
    if calls > 3 and os.environ.get("RANK") == "1":
        how()
    return [0.05 * len(text) for text in completions]

def broken(prompts, completions, **columns):
    return other(lambda: 1 / 0, completions)

def stuck(prompts, completions, **columns):
    return other(lambda: time.sleep(1000), completions)

def dead(prompts, completions, **columns):
    return other(lambda: os.kill(os.getpid(), 9), completions)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = make(tmp_path_factory.mktemp("brought"), 48)
    (folder / "mine.py").write_text(REWARD)
    return folder


def start(*words: object, cwd: Path | None = None, **environment: str) -> subprocess.Popen:
    settings = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-m", "lm_envs", *map(str, words)], env=settings, cwd=cwd, **pipes)


def run(*words: object, **environment: str) -> tuple[int, str]:
    process = start(*words, **environment)
    said = process.communicate(timeout=400)[0]
    return process.returncode, said


def train(root: Path, out: Path, reward: str = "length", *more: object, episodes: int = 14) -> list[object]:
    words = ["train", "--policy", root / "model", "--prompts", root / "prompts.jsonl", "--dtype", "float64"]
    words += ["--reward", f"{root / 'mine.py'}:{reward}", "--algorithm", "ppo", "--out", out, "--threads", 1]
    settings = {"episodes": episodes, "epochs": 2, "learning_rate": 1e-2, "kl_target": 0.5, "micro_batch": 4}
    for name, value in settings.items():
        words += ["--set", f"{name}={value}"]
    words += ["--env", "max_new_tokens=8", "--validate-every", 4, "--checkpoint-every", 3]
    return [*words, *([] if "--iterations" in more else ["--iterations", 12]), *more]


def weights(folder: Path) -> dict:
    return load_file(folder / "model" / "model.safetensors")


def gap(one: dict, other: dict) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


RUN = Path("custom", "ppo", "seed-0")


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory) -> Path:
    """A run by one process that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    code, said = run(*train(root, out))
    assert code == 0, said
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "more"), [(2, ()), (4, ()), (2, ("--fsdp",))], ids=["2", "4", "2-fsdp"])
def test_a_run_is_that_of_one_process(root, whole, tmp_path, processes, more):
    code, said = run(*train(root, tmp_path / "out", "length", "--processes", processes, *more))
    assert code == 0, said
    assert gap(weights(whole / RUN), weights(tmp_path / "out" / RUN)) < 1e-9
    one, many = (json.loads((out / RUN / "result.json").read_text()) for out in (whole, tmp_path / "out"))
    for name in ("tokens_generated", "reward_calls", "trained_tokens", "episodes", "inference_tokens"):
        assert one[name] == many[name]
    assert many["proxy"] == pytest.approx(one["proxy"], abs=1e-9)
    texts = [(out / RUN / "samples.jsonl").read_text().count("\n") for out in (whole, tmp_path / "out")]
    assert texts[0] == texts[1] and said.count("done (1/1)") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "data", "more"),
    [
        ("sft", "demonstrations", ()),
        ("dpo", "preferences", ()),
        ("dpo", "preferences", ("--loss", "simpo", "--lora-rank", 2, "--lora-merge")),
        ("reward-model", "preferences", ()),
    ],
    ids=["sft", "dpo", "lora", "reward-model"],
)
def test_stages_are_those_of_one_process(root, tmp_path, command, data, more):
    words = [command, "--model", root / "model", "--data", root / f"{data}.jsonl", "--dtype", "float64"]
    words += ["--learning-rate", 1e-2, "--threads", 1, "--set", "micro_batch=3", "--batch-size", 7, *more]
    for processes in (1, 2):
        code, said = run(*words, "--out", tmp_path / str(processes), "--processes", processes)
        assert code == 0, said
    assert gap(weights(tmp_path / "1"), weights(tmp_path / "2")) < 1e-9
    one, two = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("1", "2"))
    held = [name for name in one if name.startswith("held_out")]
    assert held and all(two[name] == pytest.approx(one[name], rel=1e-9) for name in held)


@pytest.mark.slow
def test_best_of_n_counts_what_all_processes_sampled(root, tmp_path):
    for processes in (1, 2):
        out = tmp_path / str(processes)
        words = ["train", "--policy", root / "model", "--prompts", root / "prompts.jsonl", "--dtype", "float64"]
        words += ["--reward", f"{root / 'mine.py'}:length", "--algorithm", "best-of-4", "--out", out, "--threads", 1]
        code, said = run(*words, "--processes", processes)
        assert code == 0, said
    one, two = (
        json.loads((tmp_path / n / "custom" / "best-of-4" / "seed-0" / "result.json").read_text()) for n in "12"
    )
    for name in ("tokens_generated", "reward_calls", "episodes", "proxy", "kl", "golds", "length"):
        assert one[name] == pytest.approx(two[name], abs=1e-9, nan_ok=True)


def ranks_of(launcher: subprocess.Popen) -> dict[str, int]:
    """The processes that a launcher started, by rank."""
    found = {}
    listed = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for pid in map(int, listed):
        variables = dict(v.split("=", 1) for v in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in v)
        found[variables["RANK"]] = pid
    return found


def newest(out: Path) -> int:
    return max((int(path.name[-6:]) for path in (out / RUN / "checkpoints").glob("checkpoint-*")), default=0)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_law_10_whoever_is_killed_and_however_many_go_on(root, tmp_path):
    long = ("--iterations", 60)
    code, said = run(*train(root, tmp_path / "whole", "length", *long))
    assert code == 0, said
    out, choice = tmp_path / "out", random.Random(7)
    for number in range(10):
        processes, fsdp = ((2, True), (1, False), (4, True), (2, False), (4, False))[number % 5]
        more = ["--processes", processes, *(["--fsdp"] if fsdp else [])]
        more += ["--resume"] if (out / "comparison.json").exists() else []
        launcher, before = start(*train(root, out, "length", *long, *more), SLOW="0.15"), newest(out)
        while launcher.poll() is None and newest(out) == before:
            time.sleep(0.02)
        assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(choice.uniform(0, 0.6))
        if processes == 1 or choice.random() < 0.5:
            for pid in ranks_of(launcher).values():
                os.kill(pid, signal.SIGKILL)
            launcher.kill()
        else:
            ranks = ranks_of(launcher)
            os.kill(ranks[choice.choice(sorted(ranks))], signal.SIGKILL)
            assert launcher.wait(60) == 1
        launcher.communicate()
    assert newest(out) < 60
    code, said = run(*train(root, out, "length", *long, "--processes", 2, "--resume"))
    assert code == 0, said
    assert gap(weights(tmp_path / "whole" / RUN), weights(out / RUN)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "why"),
    [
        ("broken", "process 1: reward 'broken' raised ZeroDivisionError"),
        ("dead", "process 1 ended without a word: it was killed"),
        ("stuck", "process 1 hangs at "),
    ],
)
def test_the_line_names_the_process_and_its_own_error(root, tmp_path, reward, why):
    began = time.monotonic()
    code, said = run(*train(root, tmp_path / "out", reward, "--processes", 3), LM_ENVS_WAIT_S="15")
    assert code == 1 and time.monotonic() - began < 240
    ours = [line for line in said.splitlines() if line.startswith("lm-envs: ")]
    assert len(ours) == 1 and why in ours[0] and "--resume" in ours[0], said
    assert "Traceback" not in said and "mine.py, line" in ours[0] + "mine.py, line" * (reward == "dead")


@pytest.mark.slow
def test_an_interrupt_stops_all_after_the_iteration(root, tmp_path):
    out = tmp_path / "out"
    launcher = start(*train(root, out, "length", "--processes", 2, "--iterations", 5000), SLOW="0.05")
    while launcher.poll() is None and newest(out) < 3:
        time.sleep(0.05)
    launcher.send_signal(signal.SIGINT)
    said = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 130 and said.count("Stopping after this iteration") == 1, said
    assert "--processes 2" in said and said.rstrip().endswith("--resume") and "Traceback" not in said
    lines = (out / RUN / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["iteration"] == newest(out)


MINE = """
import os
from dataclasses import replace
from tests.benchmarks import fake_task

def rewarded(prompts, completions, **columns):
    if os.environ.get("RANK") == "1" and os.path.exists("dies"):
        os.kill(os.getpid(), 9)
    return [float(len(text)) for text in completions]

def load():
    return replace(fake_task.load(), name="mine", reward=rewarded)
"""


@pytest.mark.slow
def test_a_run_in_a_worker_may_be_shared(tmp_path, monkeypatch):
    """As in a task of a Ray cluster; where a helper dies, the run fails alone."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    plan = Plan(iterations=3, test_prompts=6, validation_prompts=4)
    spec = RunSpec("mine.py:load", "ppo", 0, plan, overrides={"episodes": 8})

    def last(out: str, shared: tuple[int, bool]) -> Event:
        told: list[Event] = []
        run_in_workers([spec], Path(out), jobs=1, notify=told.append, stop=StopRequest(), shared=shared)
        return told[-1]

    one, two = last("one", (1, False)), last("two", (2, False))
    assert two["result"]["proxy"] == pytest.approx(one["result"]["proxy"], abs=1e-4)
    assert 0 < gap(weights(Path("one") / spec.folder), weights(Path("two") / spec.folder)) < 1e-5
    assert last("shares", (2, True))["event"] == "done"
    assert gap(weights(Path("two") / spec.folder), weights(Path("shares") / spec.folder)) < 1e-5
    Path("dies").touch()
    event = last("dead", (2, False))
    assert event["event"] == "failed" and not event["fatal"]
    assert "process 1 ended without a word: it was killed" in event["message"]
    Path("dies").unlink()
    assert last("dead", (2, False))["event"] == "done"
    assert gap(weights(Path("two") / spec.folder), weights(Path("dead") / spec.folder)) == 0


@pytest.mark.slow
def test_more_processes_than_groups_are_refused(root, tmp_path):
    code, said = run(*train(root, tmp_path / "out", "length", "--processes", 3, episodes=2))
    assert code == 1
    assert "ppo: 3 processes share the 2 groups of a batch (episodes=2, group_size=1)" in said.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_device_that_is_not_there_is_named(root, tmp_path):
    code, said = run(*train(root, tmp_path / "out", "length", "--processes", 2, "--device", "cuda"))
    assert code == 1 and said.splitlines()[-1].endswith("processes of this machine need a GPU each, and it has 0")


@pytest.mark.slow
def test_an_optimizer_that_needs_all_weights_is_refused(root, tmp_path):
    words = ["train", "--policy", root / "model", "--prompts", root / "prompts.jsonl", "--algorithm", "trpo"]
    words += ["--reward", f"{root / 'mine.py'}:length", "--set", "episodes=8", "--env", "max_new_tokens=8"]
    code, said = run(*words, "--out", tmp_path / "out", "--processes", 2, "--fsdp")
    assert code == 1 and "--fsdp: this algorithm's own optimizer steps all weights" in said.splitlines()[-1]


@pytest.mark.slow
def test_processes_that_see_different_files_are_refused(root, tmp_path):
    """At the same relative place, as on two machines."""
    began, ranks = time.monotonic(), []
    for place in places(2):
        rank = place["RANK"]
        shutil.copytree(root, tmp_path / rank)
        prompts = tmp_path / rank / "prompts.jsonl"
        prompts.write_text(prompts.read_text().replace("e", "ea"[int(rank)]))
        words = [str(word).removeprefix(f"{root}/") for word in train(root, tmp_path / "out")]
        ranks.append(start(*words, cwd=tmp_path / rank, **place))
    said = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1] and time.monotonic() - began < 120
    assert "differ in inputs.prompts 'prompts.jsonl': process 0 has" in said[0].splitlines()[-1]


def test_shares_need_processes():
    with pytest.raises(UserError, match="--fsdp shares out the weights among processes: add --processes N"):
        carry_out(lambda: None, fsdp=True)


def test_a_port_in_use_is_named():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} is in use") as caught:
            group._store(0, 2, "127.0.0.1", port, False)
    assert explain(caught.value).startswith("port ")


def test_those_who_do_not_come_are_counted(monkeypatch):
    monkeypatch.setattr(group, "COME_S", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ValueError, match="not all of 2 processes came"):
        group._store(0, 2, "127.0.0.1", port, False)
