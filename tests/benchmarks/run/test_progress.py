"""The figures shown beside a run under way and at its end, and when a line is written where there is no terminal."""

from __future__ import annotations

import io
import math
import re
import time

import pytest
from rich.console import Console

from lm_envs.benchmarks.run import silence
from lm_envs.benchmarks.run.one_run import execute
from lm_envs.benchmarks.run.progress import Display, figures, final_figures, sample_line
from lm_envs.benchmarks.run.suites import Plan, RunSpec
from tests.benchmarks.fake_task import NAME

VALIDATED = {"validation_gold": 0.5, "validation_proxy": 0.25, "validation_kl": 9.0, "validation_return": 7.0}


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        (VALIDATED, "return 7.00  gold 0.50  proxy 0.25  KL 9.00"),
        # what training sampled comes first, and a text has a score instead of a return
        (VALIDATED | {"score": 2.0, "kl": 3.0, "return": 1.0}, "gold 0.50  proxy 2.00  KL 3.00"),
        ({"return": 21.5, "kl": math.nan, "tokens_per_second": 9840.0}, "return 21.50  9.8k tok/s"),
        ({"ranking_loss": 0.69, "validation_loss": 0.7}, "loss 0.69  held-out loss 0.70"),
        ({"dpo_loss": 0.6, "validation_accuracy": 0.75, "nll": None}, "loss 0.60  held-out accuracy 0.75"),
        ({}, ""),
    ],
)
def test_figures_of_an_iteration(metrics, text):
    assert figures(metrics) == text


def test_figures_of_a_result():
    result = {"win_rate": 0.615, "gold": 0.25, "proxy": 1.5, "kl": 3.14}
    assert final_figures(result) == "win-rate 62 %  gold 0.25  proxy 1.50  KL 3.1"
    assert final_figures(result | {"kl_is_bound": True}).endswith("KL ≤3.1")
    assert final_figures(result | {"win_rate": None, "gold": None, "kl": None}) == "proxy 1.50"


def test_lines_where_there_is_no_terminal(monkeypatch):
    """The first iteration, one after every_s seconds, and the last; a metric that is not measured again stays."""
    clock = iter([100.0, 109.0, 110.0, 111.0])
    monkeypatch.setattr("lm_envs.benchmarks.run.progress.time.monotonic", lambda: next(clock))
    written = io.StringIO()
    with Display(Console(file=written, width=200), 3, every_s=10.0) as shown:
        shown({"event": "start", "run": "a", "of": 4, "iteration": 0})
        for iteration, gold in ((1, 0.5), (2, 0.6), (3, None), (4, None)):
            metrics = {"iteration": iteration, "score": float(iteration)} | ({"validation_gold": gold} if gold else {})
            shown({"event": "iteration", "run": "a", "of": 4, "metrics": metrics})
        result = {"win_rate": 0.5, "gold": 0.1, "proxy": 0.2, "kl": 0.3}
        shown({"event": "start", "run": "b", "of": 4, "iteration": 2})
        shown({"event": "failed", "run": "b", "message": "diverged"})
        shown({"event": "stopped", "run": "c", "iteration": 3})
        shown({"event": "stopped", "run": "d", "iteration": 0})
        shown({"event": "done", "run": "a", "result": result})
    assert written.getvalue().splitlines() == [
        "a: iteration 1/4  gold 0.50  proxy 1.00",
        "a: iteration 3/4  gold 0.60  proxy 3.00",
        "a: iteration 4/4  gold 0.60  proxy 4.00",
        "b: continuing after iteration 2",
        "b: FAILED: diverged",
        "c: stopped, saved after iteration 3",
        "d: stopped before a checkpoint: --resume begins it again",
        "a: done (1/3)  win-rate 50 %  gold 0.10  proxy 0.20  KL 0.3",
    ]


def test_sampled_texts_are_one_printable_line_each():
    long = {"prompt": f"{'a' * 60} end", "response": "b" * 500, "score": 0.5}
    line = sample_line(long)
    assert line.startswith("    0.50  ...aaa") and " end | bbb" in line and line.endswith("b...") and len(line) < 190
    assert sample_line({"prompt": "p\x1b[2J", "response": "a\n\nb", "score": math.nan}) == "       –  p\\x1b[2J | a b"


def test_the_texts_of_a_run_are_written_at_once():
    class Pieces(io.StringIO):
        parts: list[str] = []

        def write(self, text: str) -> int:
            self.parts.append(text)
            return len(text)

    texts = [{"prompt": f"p{i}", "response": "r", "score": float(i)} for i in range(3)]
    with Display(Console(file=Pieces(), width=40), 1) as shown:
        shown({"event": "texts", "run": "a", "iteration": 5, "texts": texts})
    (whole,) = filter(None, Pieces.parts)
    assert whole.splitlines() == ["a: texts of iteration 5", *(f"    {i}.00  p{i} | r" for i in range(3))]


def test_a_run_shows_texts_of_its_own_batches(tmp_path):
    events = {}
    for show in (0, 2):
        found: list[dict] = []
        run = RunSpec(NAME, "reinforce", 0, Plan(iterations=4, test_prompts=4), overrides={"episodes": 8})
        result = execute(run, tmp_path / str(show), show=show, notify=found.append)
        events[show] = [event for event in found if event["event"] == "texts"]
        assert result["reward_calls"] == 4 * 8  # at no cost
    assert events[0] == [] and [event["iteration"] for event in events[2]] == [2, 4]
    for event in events[2]:
        assert len(event["texts"]) == 3
        for text in event["texts"]:
            words = text["response"].split()
            assert text["score"] == words.count("b") - words.count("c")


def test_a_long_silence_is_broken(monkeypatch):
    """What is under way, and for how long; not while lines come, and not in a terminal, where a clock runs."""
    written = io.StringIO()
    monkeypatch.setattr(silence, "AFTER_S", 0.2)
    with Display(Console(file=written, width=200), 1) as shown:
        time.sleep(0.5)
        shown({"event": "start", "run": "a", "of": 4, "iteration": 1})
        time.sleep(0.5)
        shown({"event": "evaluate", "run": "a"})
        time.sleep(0.5)
    lines = written.getvalue().splitlines()
    assert re.fullmatch(r"opening models and reading the data, \d s so far", lines[0])
    assert any(re.fullmatch(r"a: iteration 2/4, \d s so far", line) for line in lines)
    assert re.fullmatch(r"a: measuring on test prompts, \d s so far", lines[-1])
    written = io.StringIO()
    with Display(Console(file=written, width=200), 1) as shown:
        for _ in range(10):
            shown.say("busy")
            time.sleep(0.05)
    assert set(written.getvalue().splitlines()) == {"busy"}
