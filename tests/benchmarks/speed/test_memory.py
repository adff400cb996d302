"""The memory benchmark: a small run from end to end, beside a checkout that is this one."""

from __future__ import annotations

import csv

import pytest

from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.speed import memory
from tests.house import CHECKOUT


@pytest.mark.slow
def test_a_small_run(tmp_path):
    small = ["--rows", "2", "--tokens", "4", "--layers", "1", "--vocabulary", "50", "--threads", "1", "--rounds", "1"]
    main(["bench", "memory", *small, "--against", str(CHECKOUT), "--out", str(tmp_path / "memory.csv")])
    with (tmp_path / "memory.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert [(line["task"], line["way"]) for line in lines] == [
        (t, w) for t in memory.TASKS for w in ("this", "against")
    ]
    assert all(float(line["of_peak_MB"]) == 1 and float(line["peak_MB"]) > 0 for line in lines)
    assert all(float(line["seconds"]) > 0 for line in lines)
