"""Runs on a Ray cluster: a real one of two nodes on this machine, a node that is lost, a driver that is killed."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.commands.compare import Compare
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run import cluster
from lm_envs.benchmarks.run.cluster import _Driver
from lm_envs.benchmarks.run.inputs import fingerprints, versions
from lm_envs.benchmarks.run.suite_files import parse_suite
from lm_envs.benchmarks.run.suites import Plan, Resources, RunSpec
from tests.benchmarks.fake_task import NAME
from tests.benchmarks.run.refusals import refused
from tests.house import CHECKOUT

ALGORITHM = "from lm_envs.algos.reinforce import REINFORCE\n\n\nclass Mine(REINFORCE):\n    name = 'mine'\n"


def suite(tmp_path: Path, mark: Path | None = None, seeds: int = 2) -> list[str]:
    """Words of a comparison whose runs have overrides, an algorithm in a file and, with a mark, a pause."""
    (tmp_path / "mine.py").write_text(ALGORITHM)
    others = "" if mark else ', "best-of-2"'  # a pause is for a worker's first run
    pause = f'options = {{ pause = "reward", mark = "{mark}", at = 5 }}' if mark else ""
    (tmp_path / "suite.toml").write_text(
        f'tasks = ["{NAME}"]\nalgorithms = ["mine.py:Mine"{others}]\nseeds = {list(range(seeds))}\n'
        "[budget]\niterations = 4\n[evaluation]\ntest_prompts = 6\nvalidation_prompts = 4\nevery = 2\n"
        "[checkpoints]\nevery = 1\n[resources]\ncpus = 1\n"
        f'[algorithm."mine.py:Mine"]\nlearning_rate = 0.02\nepisodes = 8\n[task."{NAME}"]\n{pause}\n'
    )
    return ["compare", "--suite", str(tmp_path / "suite.toml"), "--out"]


def results(out: Path) -> list[dict[str, str]]:
    """The rows of a comparison without times."""
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.endswith(("_s", "per_second"))} for row in rows]


SMALL = {"object_store_memory": 80_000_000}


@pytest.fixture(scope="module")
def made():
    """A cluster of two nodes with one core each; the driver's node has none."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(CHECKOUT))
        patch.setenv("RAY_worker_niceness", "0")  # on a busy machine they would hardly run
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **SMALL})
        for _ in range(2):
            cluster.add_node(num_cpus=1, **SMALL)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def two_nodes(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    monkeypatch.setenv("RAY_worker_niceness", "0")  # of nodes that a test adds
    return made, sorted(made.worker_nodes, key=lambda node: node.node_ip_address)


def wait_for(true, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_results_are_those_of_this_machine(tmp_path, two_nodes, capsys):
    made, _ = two_nodes
    words = suite(tmp_path)
    main([*words, "one"])
    main([*words, "two", "--jobs", "2"])
    main([*words, "ray", "--ray", made.address])
    assert results(tmp_path / "ray") == results(tmp_path / "one") == results(tmp_path / "two")
    assert len(results(tmp_path / "ray")) == 4
    assert not list((tmp_path / "ray").glob(".tmp-*"))  # the token
    assert all((path / "log.txt").exists() for path in (tmp_path / "ray").glob("*/*/seed-*"))
    told = capsys.readouterr().err
    assert "done (4/4)" in told and "iteration 4/4" in told

    Path("large.toml").write_text((tmp_path / "suite.toml").read_text().replace("cpus = 1", "cpus = 3\nmemory = 0.1"))
    said = refused(capsys, "compare", "--suite", "large.toml", "--out", "large", "--ray", made.address)
    assert "no node of the cluster has what a run takes (CPU 3, memory 1e+08)" in said and not Path("large").exists()

    Path("bad.py").write_text("def load():\n    raise RuntimeError('what a pity')\n")
    said = refused(capsys, "compare", "--algorithms", "reinforce", "--out", "bad", "--ray", made.address,
                   "--task", "bad.py:load")  # fmt: skip
    assert "what a pity" in said


@pytest.mark.slow
def test_a_run_of_several_processes_on_a_node(tmp_path, two_nodes, capsys):
    made, _ = two_nodes
    words = suite(tmp_path, seeds=1)
    text = (tmp_path / "suite.toml").read_text().replace("cpus = 1", "cpus = 1\nprocesses = 2")
    (tmp_path / "suite.toml").write_text(text)
    said = refused(capsys, *words, "ray", "--ray", made.address)
    assert "no node of the cluster has what a run takes (CPU 2)" in said
    large = made.add_node(num_cpus=2, **SMALL)
    try:
        main([*words, "ray", "--ray", made.address])
    finally:
        made.remove_node(large)
    subprocess.run([sys.executable, "-m", "lm_envs", *words, "two", "--processes", "2"], check=True)
    main([*words, "one"])
    assert results(tmp_path / "ray") == results(tmp_path / "two")
    for found, alone in zip(results(tmp_path / "ray"), results(tmp_path / "one"), strict=True):
        numbers = {name for name, value in alone.items() if value.replace(".", "").replace("-", "").isdigit()}
        assert {n: v for n, v in found.items() if n not in numbers} == {
            n: v for n, v in alone.items() if n not in numbers
        }
        for name in numbers:
            assert float(found[name]) == pytest.approx(float(alone[name]), rel=1e-4, abs=1e-5), name


@pytest.mark.slow
def test_a_node_is_lost_and_its_run_goes_on_elsewhere(tmp_path, two_nodes):
    made, nodes = two_nodes
    mark = tmp_path / "mark"
    words = suite(tmp_path, mark)
    driver = subprocess.Popen(
        [sys.executable, "-m", "lm_envs", *words, "ray", "--ray", made.address], stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: driver.poll() is not None or (mark.exists() and mark.read_text()))
    parent = int(Path(f"/proc/{mark.read_text()}/stat").read_text().rpartition(")")[2].split()[1])
    (its,) = (node for node in nodes if node.all_processes["raylet"][0].process.pid == parent)
    made.remove_node(its, allow_graceful=False)
    made.add_node(num_cpus=1, **SMALL)  # for the next test
    _, told = driver.communicate(timeout=600)
    assert driver.returncode == 0, told
    assert "its node was lost; it goes on elsewhere" in told and "continuing after iteration" in told
    main([*words, "one"])
    assert results(tmp_path / "ray") == results(tmp_path / "one")


@pytest.mark.slow
def test_a_driver_is_killed_and_resumed(tmp_path, two_nodes):
    made, _ = two_nodes
    mark = tmp_path / "mark"
    words = [*suite(tmp_path, mark), "ray", "--ray", made.address]
    driver = subprocess.Popen([sys.executable, "-m", "lm_envs", *words], stderr=subprocess.DEVNULL)
    wait_for(mark.exists)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    main([*words, "--resume"])
    main([*words[:-3], "one"])
    assert results(tmp_path / "ray") == results(tmp_path / "one")


@pytest.mark.slow
def test_ctrl_c_stops_after_the_iteration(tmp_path, two_nodes):
    made, _ = two_nodes
    words = suite(tmp_path)
    text = (tmp_path / "suite.toml").read_text().replace("iterations = 4", "iterations = 100000")
    (tmp_path / "suite.toml").write_text(text)
    driver = subprocess.Popen(
        [sys.executable, "-m", "lm_envs", *words, "ray", "--ray", made.address], stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: any(len(p.read_text().splitlines()) > 3 for p in (tmp_path / "ray").rglob("metrics.jsonl")))
    driver.send_signal(signal.SIGINT)
    _, told = driver.communicate(timeout=200)
    assert driver.returncode == 130 and "stopped, saved" in told and "--resume" in told and "Traceback" not in told


# ---- what a node is asked, without a cluster ----


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """What a driver in this folder tells nodes, and a run of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("mine.py").write_text(ALGORITHM)
    Path("out").mkdir()
    Path("out/token").write_text("secret")
    spec = RunSpec(NAME, "mine.py:Mine", 0, Plan())
    about = {"out": Path("out").resolve(), "token": "token", "content": "secret", "folder": str(tmp_path)}
    yield _Driver(**about, path=(), versions=dict(versions()), inputs={spec.label: fingerprints(spec)}), spec


def test_a_node_takes_part_if_it_has_what_the_driver_has(driver, monkeypatch):
    told, spec = driver
    monkeypatch.chdir("/")
    assert told.complaint([spec]) is None and os.getcwd() == told.folder


def test_a_node_that_sees_another_folder_is_refused(driver):
    told, spec = driver
    Path("out/token").write_text("of another disk")
    assert "does not see the folder" in told.complaint([spec])
    shutil.rmtree("out")
    assert "does not see the folder" in told.complaint([spec])


def test_a_node_with_other_versions_or_files_is_refused(driver):
    told, spec = driver
    before, told.versions["torch"] = told.versions["torch"], "1.0"
    assert "it has torch 2" in told.complaint([spec]) and "the driver has 1.0" in told.complaint([spec])
    told.versions["torch"] = before
    Path("mine.py").write_text(ALGORITHM + "# edited\n")
    assert "it has other contents of algorithm 'mine.py'" in told.complaint([spec])
    Path("mine.py").unlink()
    assert "it has no algorithm 'mine.py'" in told.complaint([spec])


def test_a_task_needs_a_gpu_for_a_run_that_does(tmp_path):
    spec = RunSpec("custom", "ppo", 0, Plan(), options={"device": "cuda:1"})
    with pytest.raises(UserError, match="set gpus under"), cluster.joined("auto", tmp_path, [spec], Resources(), 1):
        raise AssertionError


def test_without_ray(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    words = ["compare", "--task", NAME, "--algorithms", "sft", "--test-prompts", "6", "--out", str(tmp_path / "out")]
    assert "pip install 'lm-envs[ray]'" in refused(capsys, *words, "--ray", "auto")
    assert "--ray and --jobs exclude" in refused(capsys, *words, "--ray", "auto", "--jobs", "2")
    with pytest.raises(UserError, match="--ray and --processes exclude each other: set processes under .resources."):
        Compare(out=tmp_path, ray="auto", processes=2).where()
    assert not (tmp_path / "out").exists()


def test_resources_of_a_suite():
    text = 'tasks = ["reviews"]\nalgorithms = ["ppo"]\n[resources]\n'
    assert parse_suite(text + "cpus = 4\ngpus = 0.5\nmemory = 16", "s").resources == Resources(4, 0.5, 16)
    with pytest.raises(UserError, match="s, line 5: .*fraction of one GPU or several whole ones"):
        parse_suite(text + "cpus = 4\ngpus = 1.5", "s")
    with pytest.raises(UserError, match="s, line 4: .*cpus"):
        parse_suite(text + "cpus = 0", "s")
    assert parse_suite(text + "processes = 2\nfsdp = true", "s").resources == Resources(processes=2, fsdp=True)
    with pytest.raises(UserError, match="s, line 4: .*processes"):
        parse_suite(text + "processes = 0", "s")
    with pytest.raises(UserError, match=r"s, line 4: .*each of several processes takes a whole GPU or none, not 0\.5"):
        parse_suite(text + "gpus = 0.5\nprocesses = 2", "s")
    with pytest.raises(UserError, match="s, line 4: .*fsdp shares out the weights among processes: set processes"):
        parse_suite(text + "fsdp = true", "s")
