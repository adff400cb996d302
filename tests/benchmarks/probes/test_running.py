"""A sweep as a user runs it: its files, recomputed; killed, continued, extended; on one process and on two; refused."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t

from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.commands import probe
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.probes import base, running
from lm_envs.benchmarks.probes.registry import PROBES
from lm_envs.benchmarks.probes.report import Scores, as_markdown, beyond, words
from lm_envs.benchmarks.probes.running import Sweep, carry_out
from tests.house import CHECKOUT

MINE = """
from lm_envs.benchmarks.probes.base import Probe, plain

PROBE = Probe("mine", "noise", (0.0, 2.0), lambda value, seed: plain(seed, noise=value), "Mine: a probe of one's own.")
"""
ALGORITHM = "from lm_envs.algos.rloo import RLOO\n\nclass Mine(RLOO):\n    pass\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a probe and an algorithm of one's own, and a budget of two batches."""
    (tmp_path / "my_probe.py").write_text(MINE)
    (tmp_path / "my_algo.py").write_text(ALGORITHM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "EPISODES", 256)
    return tmp_path


PROBE, MY_ALGORITHM = "my_probe.py:PROBE", "my_algo.py:Mine"
SWEEP = Sweep((PROBE,), ("rloo", MY_ALGORITHM), (0, 1))


def test_the_table_is_recomputed_from_the_scores(folder, capsys, monkeypatch):
    monkeypatch.setattr(probe, "EVERY_S", 0.0)
    words_of_it = ["probe", "--algorithms", "rloo", "ppo-ptx", MY_ALGORITHM, "--probes", PROBE, "preferences"]
    assert main([*words_of_it, "--seeds", "3", "--out", "out"]) in (None, 0)
    said, progress = capsys.readouterr()
    assert re.match(r"0 of (\d+) runs\n.*\n\1 of \1 runs\n$", progress, re.DOTALL)
    assert "rloo: " in said and f"{MY_ALGORITHM}: " in said and "ppo-ptx" not in said
    lines = [line for line in csv.DictReader(open("out/scores.csv")) if line["score"]]
    assert len(lines) == 2 * 2 * 3
    for line in lines:
        start, optimum, reached = (float(line[name]) for name in ("start", "optimum", "return"))
        assert float(line["score"]) == pytest.approx(min(max((reached - start) / (optimum - start), 0), 1))
    for row in csv.DictReader(open("out/summary.csv")):
        by_seed = [
            np.mean([float(r["score"]) for r in lines if r["algorithm"] == row["algorithm"] and r["seed"] == seed])
            for seed in "012"
        ]
        half = t.ppf(0.975, 2) * np.std(by_seed, ddof=1) / math.sqrt(3)
        mean = np.mean(by_seed)
        expected = (mean, max(mean - half, 0), min(mean + half, 1))
        assert [float(row[name]) for name in ("score", "low", "high")] == pytest.approx(expected)
        assert row["seeds"] == "3"
    page = Path("out/report.html").read_text()
    assert "a probe of one's own" in page.replace("&#39;", "'") and page.count("data:image/svg+xml") == 1
    assert "ppo-ptx in preferences: left out: " in page
    assert {path.name for path in Path("out/plots").iterdir()} == {"curves.png"}  # two spokes would be a line
    low, high = (float(row[name]) for name in ("low", "high"))  # of the last row
    text = Path("out/scores.md").read_text()
    assert f"| {row['probe']} | " in text and f" {float(row['score']):.2f} ±{(high - low) / 2:.2f} |" in text
    assert f"- {MY_ALGORITHM}: " in text and f"- {MY_ALGORITHM}: " not in text.partition("| probe |")[0]


def test_the_page_of_the_docs_has_the_committed_scores():
    """docs/probes.md holds the text that `lm-envs probe` writes for benchmarks/results/probes.csv."""
    with (CHECKOUT / "benchmarks" / "results" / "probes.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        score = float(line["score"]) if line["score"] else None
        line |= {"value": float(line["value"]), "seed": int(line["seed"]), "score": score}
    page = (CHECKOUT / "docs" / "probes.md").read_text(encoding="utf-8")
    held = page.partition("<!-- scores -->\n")[2].partition("<!-- end of scores -->")[0]
    assert held == as_markdown(Scores(lines))


def test_a_run_that_was_killed_is_continued_and_extended(folder):
    carry_out(SWEEP, Path("whole"))
    carry_out(Sweep((PROBE,), ("rloo",), (0, 1)), Path("parts"))
    runs = Path("parts/runs.jsonl")
    kept = runs.read_text().splitlines()
    assert len(kept) == 4
    runs.write_text("\n".join(kept[:2]) + "\n" + kept[2][:20])  # killed in the middle of a line
    seen = []
    carry_out(SWEEP, Path("parts"), resume=True, notify=lambda done, of: seen.append((done, of)))
    assert seen[0] == (2, 8) and seen[-1] == (8, 8)
    assert Path("parts/scores.csv").read_bytes() == Path("whole/scores.csv").read_bytes()
    assert len(runs.read_text().splitlines()) == 8


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    """At the whole budget: workers know nothing of a patched one."""
    (tmp_path / "my_probe.py").write_text(MINE)
    (tmp_path / "my_algo.py").write_text(ALGORITHM)
    monkeypatch.chdir(tmp_path)
    for jobs in (1, 2):
        carry_out(SWEEP, Path(f"jobs-{jobs}"), jobs=jobs)
    assert Path("jobs-1/scores.csv").read_bytes() == Path("jobs-2/scores.csv").read_bytes()


def test_an_algorithm_that_diverges_scores_0(folder):
    (folder / "my_algo.py").write_text(
        ALGORITHM.replace(
            "pass", "def rewards(self, traj, before):\n        return super().rewards(traj, before) * 1e400"
        )
    )
    record = running.work((PROBE, 0.0, 0, (MY_ALGORITHM,)))[0]
    assert record["score"] == 0 and record["return"] is None and record["note"].startswith("diverged: ")


REFUSED = [
    (["--algorithms", "pop"], "no algorithm 'pop'"),
    (["--algorithms", "sft"], "sft does not train"),
    (["--algorithms", "best-of-16"], "best-of-16 does not train"),
    (["--algorithms", "rloo", "--probes", "nois"], "no probe 'nois': did you mean 'noise'"),
    (
        ["--algorithms", "rloo", "--probes", "my_algo.py:Mine"],
        "is not a lm_envs.benchmarks.probes.base.Probe",
    ),
    (["--algorithms", "rloo", "--probes", "preferences"], "no probe suits: left out: rloo has no setting 'flip'"),
    (["--algorithms", "rloo", "rloo"], "names nothing twice"),
    (["--algorithms", "rloo", "--seeds", "0"], "at least 1"),
]


@pytest.mark.parametrize(("given", "told"), REFUSED)
def test_bad_input_gets_one_line(folder, capsys, given, told):
    with pytest.raises(SystemExit) as stop:
        main(["probe", *given, "--out", "out"])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and told in error and len(error.splitlines()) == 1, error


def test_folders_of_others_and_changed_files_are_refused(folder):
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("x")
    with pytest.raises(UserError, match="holds 'thesis.txt'.*no probes"):
        carry_out(SWEEP, Path("full"))
    carry_out(SWEEP, Path("out"))
    with pytest.raises(UserError, match="--resume continues"):
        carry_out(SWEEP, Path("out"))
    (folder / "my_algo.py").write_text(ALGORITHM + "# changed\n")
    with pytest.raises(UserError, match=r"other contents of algorithm 'my_algo\.py'"):
        carry_out(SWEEP, Path("out"), resume=True)


def records(means: dict[str, list[float]]) -> list[dict]:
    """Made-up scores of methods along the probe "noise", a seed each."""
    values = (0, 0.3, 1, 2, 4)
    return [
        {"probe": "noise", "value": float(v), "algorithm": name, "seed": 0, "score": score, "note": ""}
        for name, found in means.items()
        for v, score in zip(values, found, strict=True)
    ]


def test_words_by_hand():
    scores = Scores(records({"a": [1, 1, 0.9, 0.9, 0.2], "b": [1, 0.4, 0.4, 0.4, 0.1], "c": [0.9] * 4 + [0.3]}))
    assert words(scores, "a") == "a: fails nowhere that another method here does not."
    assert words(scores, "b") == "b: fails in noise at 0.3, 1 and 2."
    assert beyond(scores) == "No method here reaches 0.5 in noise at 4."
    scores = Scores(records({"a": [0.95] * 5, "b": [0.9, 0.8, 0.4, 0.4, 0.1]}))
    assert words(scores, "a").endswith("; within a tenth of the optimum throughout noise.")
    assert words(scores, "b") == "b: fails in noise from 1 on." and beyond(scores) == ""


def test_a_sweep_that_is_not_finished_has_no_mean():
    scores = Scores(records({"a": [1.0] * 5})[:3])
    assert scores.cell("noise", "a").shape == (0, 5) and math.isnan(scores.estimate("noise", "a").value)


@pytest.mark.slow
def test_the_committed_scores_are_of_these_probes():
    """The first and the last value of a probe, by RLOO, again; and the table covers every probe."""
    path = Path(__file__).parents[3] / "benchmarks" / "results" / "probes.csv"
    rows = [r for r in csv.DictReader(line for line in path.open() if not line.startswith("#"))]
    assert {row["probe"] for row in rows} == set(PROBES)
    for value in (0.0, 1.0):
        record, here = running.work(("noise", value, 0, ("rloo",)))[0], ("noise", value, "rloo", "0")
        row = next(r for r in rows if (r["probe"], float(r["value"]), r["algorithm"], r["seed"]) == here)
        assert record["score"] == pytest.approx(float(row["score"]), abs=0.05)
