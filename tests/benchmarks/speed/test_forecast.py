"""The cost model of many processes, by hand; and docs/scale.md holds what it says of the committed measurement."""

from __future__ import annotations

import math

import pytest

from lm_envs.benchmarks.speed import forecast, scale
from lm_envs.benchmarks.speed.forecast import Process, Work, measured, seconds, tables
from tests.house import CHECKOUT


def test_parts_by_hand():
    work = Work(1e6, rows=10, prompt=2, tokens=8, passes=3, steps=6)
    process = Process(1e9, 2e9, 1e8, 2, 1e7, 4e6, 1e-3, 1e8)
    alone, four = seconds(work, process, 1), seconds(work, process, 4)
    assert alone == pytest.approx({
        "sampling": 2e6 * 10 * 8 / 1e9,
        "scoring": 4e6 * 10 * 10 / 1e9,
        "update": 3 * 6e6 * 10 * 10 / 2e9,
        "gradients": 0,
        "gather": 0,
        "Adam": 6 * 1e6 / 1e7,
        "prepare": 1e-3 * 80,
        "checkpoint": 12e6 / 1e8 / 20,
    })  # fmt: skip
    # Three rows for the process that has the most; weights are read for each of eight tokens; a ring sends 3/2 of 4 MB.
    assert four["sampling"] == pytest.approx(max(2e6 * 3 * 8 / 1e9, 8 * 2e6 / 1e8)) == pytest.approx(0.16)
    assert four["scoring"] == pytest.approx(0.3 * alone["scoring"]) and four["update"] == pytest.approx(0.27)
    assert four["gradients"] == pytest.approx(6 * 1.5 * 4e6 / 4e6) and four["gather"] == pytest.approx(40 * 80 / 4e6)
    assert all(four[name] == alone[name] for name in ("Adam", "prepare", "checkpoint"))


TIME = {
    "processes": 1,
    "weights": "ddp",
    "seconds": 9.0,
    "sample_s": 2.0,
    "update_s": 7.0,
    "rows": 64,
    "new_tokens": 48,
}
PART = {"processes": 1, "prepare_s": 0.5, "adam_s": 0.25, "sum_s": 0.0, "parameters": 1000, "steps": 8, "passes": 4}
PART |= {"prompt_tokens": 16}


def text(*lines: dict) -> list[dict[str, str]]:
    return [{name: str(value) for name, value in line.items()} for line in lines]


def test_constants_give_the_measurement_back():
    times = text(TIME | {"weights": "fsdp", "sample_s": 1.0}, TIME | {"processes": 2, "sample_s": 1.0}, TIME)
    work, process = measured(times, text(PART, PART | {"processes": 2, "sum_s": 0.1, "adam_s": 9.0}))
    parts = seconds(work, process, 1) | {"checkpoint": 0.0}
    assert sum(parts.values()) == pytest.approx(9) and parts["sampling"] + parts["scoring"] == pytest.approx(2)
    assert parts["Adam"] == pytest.approx(8 * 0.25) and parts["prepare"] == pytest.approx(0.5)
    two = seconds(work, process, 2)
    assert two["gradients"] == pytest.approx(8 * 0.1) and two["update"] == pytest.approx((7 - 2 - 0.5) / 2)
    assert process.weights == math.inf


def test_the_page_has_the_forecast_of_the_committed_measurement():
    page = (CHECKOUT / "docs" / "scale.md").read_text(encoding="utf-8")
    held = page.partition("<!-- forecast -->\n")[2].partition("<!-- end of forecast -->")[0]
    assert held == tables(*(forecast.read(CHECKOUT / path) for path in (forecast.TIMES, forecast.PARTS)))


def test_parts_are_measured():
    job = {"shape": "small", "rows": 4, "new_tokens": 3, "iterations": 1}
    found = scale._parts(job)
    assert {name: found[name] for name in ("steps", "passes", "prompt_tokens")} == {
        "steps": 8, "passes": 4, "prompt_tokens": 16}  # fmt: skip
    assert found["parameters"] > 800_000 and found["prepare_s"] > 0 and found["adam_s"] > 10 * found["sum_s"] >= 0
