"""The benchmark of plans: a small run from end to end."""

from __future__ import annotations

import csv

import pytest

from lm_envs.benchmarks.cli import main


@pytest.mark.slow
def test_a_small_run(tmp_path):
    small = ["--width", "576", "--layers", "2", "--vocabulary", "50", "--episodes", "4", "--micro-batch", "2"]
    small += ["--new-tokens", "4", "--iterations", "2", "--configurations", "full"]
    main(["bench", "plan", *small, "--out", str(tmp_path / "plan.csv")])
    with (tmp_path / "plan.csv").open() as stream:
        (line,) = csv.DictReader(stream)
    assert line["configuration"] == "full" and int(line["trained"]) > int(line["parameters"])
    assert float(line["of_measured"]) > 0.5 and float(line["of_measured_s"]) > 0
