"""Law 8 between real processes; tests/algos/engine/test_many_processes.py checks it for every algorithm in threads."""

import os
import socket
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.algos.engine.test_many_processes import gap, learner, run
from tests.house import CHECKOUT


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(world, *words, **environment):
    """The processes of a group, each running a module of the tests."""
    shared = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}
    found = []
    for rank in range(world):
        own = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank, **environment}.items()}
        settings = {**os.environ, "PYTHONPATH": str(CHECKOUT), **own}
        command = [sys.executable, "-m", *map(str, words)]
        found.append(subprocess.Popen(command, env=settings, cwd=CHECKOUT, stderr=subprocess.PIPE, text=True))
    return found


def end(processes, timeout=120):
    try:
        return [(process.communicate(timeout=timeout)[1], process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


SLOW = ("reinforce", "grpo", "sft", "reward-modelling", "expert-iteration", "rloo")


@pytest.mark.parametrize(
    ("world", "names"),
    [(2, ("ppo",)), pytest.param(4, SLOW, marks=pytest.mark.slow)],
    ids=["2", "4"],
)
def test_processes_are_one(tmp_path, world, names):
    processes = start(world, "tests.gloo_run", tmp_path, *names)
    expected = {name: run(*learner(name))[0] for name in names}
    said = end(processes)
    assert [status for _, status in said] == [0] * world, said
    for name in names:
        found = [load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(world)]
        assert max(gap(expected[name], each) for each in found) < 1e-9
        assert all(gap(found[0], each) == 0 for each in found)
