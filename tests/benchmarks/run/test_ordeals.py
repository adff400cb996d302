"""Law 10 wherever a process can be killed, a disk be full or a file be damaged: the same run, or one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.benchmarks.run.ordeals import COMMANDS
from tests.house import CHECKOUT


def carried_out(command: str, *wanted: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.run.ordeals", command, *wanted],
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_rounds_of_a_study_go_on_wherever_they_are_killed_or_the_disk_is_full():
    """Nothing is asked, learned or trained twice, and nothing is left out: `lm-envs people next`."""
    said = carried_out("people", "left=1", "kill=20", "raise=3")
    print("\n".join(said))
    counts = [line for line in said if line.endswith("operations)")]
    assert len(counts) == 3
    assert all(re.fullmatch(r"people, (left|kill|raise): (\d+) of \2 \(\d+ operations\)", line) for line in counts)


@pytest.mark.slow
def test_some_kills_failures_and_damages():
    said = carried_out("train,dpo", "kill=60", "raise=120", "damage=3")
    assert [line.split(" of ")[0] for line in said] == [
        f"{command}, {kind}" for command in ("train", "dpo") for kind in ("kill: 3", "raise: 2", "damage: 3")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_operation_and_twenty_damages(command):
    said = carried_out(command, "left=1", "kill=20", "raise=1", "damage=20")
    print("\n".join(said))
    assert "20 of 20" in said[-1]
