"""The memory benchmark: a small run from end to end, beside a checkout that is this one."""

from __future__ import annotations

import csv

import pytest

from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.speed import kernels, memory
from lm_envs.benchmarks.speed.settings import Memory
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


def test_every_number_of_a_line_is_computed_a_second_time(monkeypatch, tmp_path):
    here = [{"seconds": s, "cpu_seconds": 2 * s, "peak_MB": 1e6 * s} for s in (1.0, 4.0, 2.0)]
    there = [{"seconds": s, "cpu_seconds": s, "peak_MB": 4e6} for s in (2.0, 2.0, 8.0)]
    monkeypatch.setattr(kernels, "in_turns", lambda ways, rounds, one: dict(zip(ways, (here, there), strict=False)))
    settings = Memory(rounds=3, against=tmp_path, threads=1)
    for ours, theirs in memory.lines(settings):
        assert (ours["way"], ours["seconds"], ours["cpu_seconds"], ours["peak_MB"]) == ("this", 2.0, 4.0, 2.0)
        assert (ours["of_seconds"], ours["of_cpu_seconds"], ours["of_peak_MB"]) == (0.5, 1.0, 0.5)
        assert (theirs["way"], theirs["seconds"], theirs["peak_MB"], theirs["of_seconds"]) == ("against", 2.0, 4.0, 1.0)
        assert (ours["rows"], ours["tokens"], ours["rounds"]) == (settings.rows, settings.tokens, 3)
