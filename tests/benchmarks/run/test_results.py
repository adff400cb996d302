"""The table, the CSV and the report, from results written by hand."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.report import html, plots
from lm_envs.benchmarks.report.html import _differences, answers, chosen_prompts, headline, write_report
from lm_envs.benchmarks.report.plots import figures
from lm_envs.benchmarks.report.series import gather, styles
from lm_envs.benchmarks.run import results
from lm_envs.benchmarks.run.compare import write_results
from lm_envs.benchmarks.run.names import folder_name
from lm_envs.benchmarks.run.results import COLUMNS, SHOWN, cell, footnotes, rich_table, table, title
from lm_envs.benchmarks.run.storage import write_sealed

NASTY = '<script>alert("x")</script> & <img src=http://example.com/a.png>'


def result(algorithm: str, seed: int, gold: float | None, kl: float, wins: list[float], **changes) -> dict:
    return {
        "task": "reviews",
        "algorithm": algorithm,
        "seed": seed,
        "win_rate": sum(wins) / len(wins) if gold is not None else None,
        "win_rate_se": 0.1 if gold is not None else None,
        "gold": gold,
        "proxy": 1.0,
        "kl": kl,
        "length": 10.0,
        "distinct_2": 0.5,
        "tokens_generated": 12345,
        "reward_calls": 100,
        "wall_s": 3.21,
        "kl_is_bound": algorithm.startswith("best"),
        "wins": wins,
        **changes,
    }


def folder_of(out: Path, row: dict) -> Path:
    folder = out / folder_name(row["task"]) / row["algorithm"] / f"seed-{row['seed']}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(out: Path, rows: list[dict], curve: bool = True) -> None:
    for row in rows:
        folder = folder_of(out, row)
        (folder / "result.json").write_text(json.dumps(row))
        (folder / "config.json").write_text(json.dumps({"agent": {"clip": NASTY}, "task": {"description": NASTY}}))
        sample = {"iteration": 0, "split": "test", "prompt": NASTY, "response": NASTY, "finish_reason": "length"}
        samples = [{**sample, "gold": -i, "proxy": i, "kl": -0.001} for i in range(5)]
        (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
        if curve and row["algorithm"] == "ppo":
            points = [
                {"iteration": i, "tokens": 100 * i, "validation_gold": i / 4, "validation_proxy": i, "validation_kl": i}
                for i in range(4)
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("results")
    write(
        out,
        [
            result("ppo", 0, 0.5, 4.0, [1, 1, 0.5, 1]),
            result("ppo", 1, 0.7, 6.0, [1, 0.5, 0.5, 1]),
            result("best-of-16", 0, 0.2, 1.8, [1, 0, 0.5, 1]),
            result("sft", 0, -0.1, 0.0, [0.5, 0.5, 0.5, 0.5]),
            result("ppo", 0, 0.4, 3.0, [1, 1, 1, 0], task="reviews-bandit"),
        ],
    )
    held = {"name": "demo " + NASTY, "tasks": [{"name": "reviews"}, {"name": "reviews-bandit"}]}
    write_sealed(out / "comparison.json", {**held, "algorithms": ["sft", "best-of-16", "ppo"]})
    return out


def test_csv_has_exactly_the_columns_in_the_suites_order(out):
    write_results(out)
    with open(out / "results.csv") as file:
        rows = list(csv.reader(file))
    names = "task, algorithm, seed, win_rate, win_rate_se, gold, proxy, kl, length, distinct_2, tokens_generated"
    assert rows[0] == [*names.split(", "), "reward_calls", "wall_s"] == list(COLUMNS)
    assert [(row[0], row[1], row[2]) for row in rows[1:]] == [
        ("reviews", "sft", "0"),
        ("reviews", "best-of-16", "0"),
        ("reviews", "ppo", "0"),
        ("reviews", "ppo", "1"),
        ("reviews-bandit", "ppo", "0"),
    ]
    assert rows[3] == "reviews,ppo,0,0.875,0.1,0.5,1,4,10,0.5,12345,100,3.21".split(",")


def test_unknown_numbers_are_empty_cells(tmp_path):
    write(tmp_path, [result("ppo", 0, None, 4.0, [math.nan])])
    rows = write_results(tmp_path)
    line = (tmp_path / "results.csv").read_text().splitlines()[1]
    assert line == "reviews,ppo,0,,,,1,4,10,0.5,12345,100,3.21"
    lines = table(rows)
    assert cell(lines[0], SHOWN[0]) == cell(lines[0], SHOWN[1]) == "–"
    assert any("no judge" in note for note in footnotes(lines))
    assert "no judge" in headline(rows)
    write_report(tmp_path, rows)


def test_samples_of_a_sensitive_task_are_in_the_report_only_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(html, "figures", lambda series: {})
    write(tmp_path, [result("sft", 0, 0.5, 0.0, [0.5]), result("ppo", 0, 0.5, 4.0, [1])])
    for folder in tmp_path.glob("reviews/*/seed-0"):
        (folder / "samples.jsonl").write_text((folder / "samples.jsonl").read_text().replace("script", "tell nobody"))
    rows = write_results(tmp_path)
    assert "tell nobody" in write_report(tmp_path, rows).read_text()
    for config in tmp_path.glob("reviews/*/seed-0/config.json"):
        config.write_text(json.dumps({"task": {"sensitive": True}}))
    page = write_report(tmp_path, rows).read_text()
    assert "tell nobody" not in page and "lm-envs report DIR --show" in page
    page = write_report(tmp_path, rows, show=True).read_text()
    assert "tell nobody" in page and "lm-envs report DIR --show" not in page


def test_the_table_averages_over_seeds_with_honest_errors(out):
    lines = {(line.task, line.algorithm): line for line in table(write_results(out))}
    ppo = lines["reviews", "ppo"]
    assert ppo.seeds == (0, 1)
    assert ppo.mean["gold"] == pytest.approx(0.6) and ppo.spread["gold"] == pytest.approx(0.2 / math.sqrt(2))
    # Per prompt, over the seeds: 1, 0.75, 0.5, 1. The seeds differ by 1/8, whose share of the variance, 1/256, is that
    # of the rest as well: so the prompts' share is left, with their degrees of freedom.
    assert ppo.mean["win_rate"] == pytest.approx(0.8125)
    variance = ((1 - 0.8125) ** 2 * 2 + (0.75 - 0.8125) ** 2 + (0.5 - 0.8125) ** 2) / 3
    assert ppo.spread["win_rate"] == pytest.approx(math.sqrt(variance / 4))
    columns = {column.name: column for column in SHOWN}
    assert cell(ppo, columns["gold"]) == "0.60 ±0.14"
    half = 3.182446 * math.sqrt(variance / 4)  # Student's t with 3 degrees of freedom
    assert cell(ppo, columns["win_rate"]) == f"81.2 [{100 * (0.8125 - half):.0f}, 100]"
    assert cell(lines["reviews", "best-of-16"], columns["win_rate"]).startswith("62.5 [")
    notes = footnotes(list(lines.values()))
    assert any("95 % interval over test prompts or training seeds and test prompts" in note for note in notes)
    assert cell(lines["reviews", "best-of-16"], columns["kl"]) == "≤1.8"
    assert cell(ppo, columns["tokens_generated"]) == "12,345"
    measured = table([result("best-of-16", 0, 0.2, 1.6, [1, 0], kl_is_bound=False, kl_bound=1.84)])[0]
    assert cell(measured, columns["kl"]) == "1.6 (≤1.8)"
    assert any(note.startswith("The KL of best-of-n is measured") for note in footnotes([measured]))


def test_the_headline_says_who_wins_and_who_does_not_clearly(out):
    rows = [row for row in write_results(out) if row["task"] == "reviews"]
    text = headline(rows)
    assert text.startswith("ppo reaches the highest gold score, 0.60 [-0.67, 1.87] against SFT's -0.10, at a KL of 5.0")
    assert "wins 81 % [43, 100] of the test prompts against SFT." in text
    assert "One seed of a method cannot tell which method is better." in text  # best-of-16 and SFT have one
    assert text.endswith("The win-rate's interval holds 50 % or less: best-of-16, ppo.")


def test_the_headline_calls_a_method_better_with_its_interval_only():
    def golds(mean: float, seed: int) -> list[float]:
        return [mean + 0.01 * seed + 0.1 * (i % 5) for i in range(40)]

    def rows(seeds: int) -> list[dict]:
        made = {"sft": 0.0, "ppo": 0.9, "rloo": 0.895}
        return [
            result(name, seed, gold, 3.0, [1.0, 0.0] * 20, golds=golds(gold, seed if name != "sft" else -seed))
            for name, gold in made.items()
            for seed in range(seeds)
        ]

    text = headline(rows(5))
    assert "It is better than rloo by 0.01 [0.01, 0.01] and sft by 0.94 [0.90, 0.98]." in text
    near = [
        row | {"golds": [x + 0.02 * row["seed"] * (-1) ** row["seed"] for x in row["golds"]]}
        if row["algorithm"] == "rloo"
        else row
        for row in rows(5)
    ]
    text = headline(near)
    assert "It is better than sft by 0.94" in text and "Not told apart from it: rloo." in text
    assert "better than" not in headline(rows(1))


def test_the_headline_says_how_many_seeds_would_tell():
    """The interval of one pair is above 0, the test among all methods is not passed: a reader asks why."""
    made = {"sft": (0.0, 0.0, 0.0), "ppo": (0.8, 0.9, 1.0)} | {f"m{i}": (0.1 * i, 0.2, 0.3) for i in range(6)}
    rows = [
        result(name, seed, gold, 3.0, [1.0, 0.0] * 20, golds=[gold] * 40)
        for name, golds in made.items()
        for seed, gold in enumerate(golds)
    ]
    level = 0.05 * 0.5 / 7  # of seven pairs with SFT
    spread = np.array([0.8, 0.9, 1.0]).std(ddof=1)
    seeds = next(n for n in range(2, 99) if 2 * stats.t.sf(0.9 / spread * math.sqrt(n), n - 1) < level)
    text = headline(rows)
    assert "sft" in text.split("Not told apart from it: ")[1].split(".")[0]
    assert f"It is 0.90 [0.65, 1.15] above SFT; among 8 methods it takes about {seeds} seeds" in text
    assert "it takes about" not in headline(rows[:6])


@pytest.mark.parametrize("width", [80, 160])
def test_the_terminal_table_is_whole_at_any_width(out, width):
    from rich.console import Console

    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(rich_table(table(write_results(out)), width))
    text = console.export_text()
    assert "0.60 ±0.14" in text and "…" not in text
    assert ("reward calls" in text) == (width == 160)


def test_positive_rates_have_columns_where_a_task_has_thresholds(tmp_path):
    from rich.console import Console

    def shown_text() -> str:
        console = Console(width=160, record=True, file=open("/dev/null", "w"))
        console.print(rich_table(table(write_results(tmp_path)), 160))
        return console.export_text()

    rates = [0.75, 0.25]
    write(tmp_path, [result("ppo", s, 0.6, 4.0, [1, 0]) for s in (0, 1)])
    assert "gold + %" not in shown_text()
    write(tmp_path, [result("ppo", s, 0.6, 4.0, [1, 0], gold_positive=rate) for s, rate in enumerate(rates)])
    text = shown_text()
    assert "gold + %" in text and "50.0" in text and "proxy + %" not in text
    assert "gold_positive" not in (tmp_path / "results.csv").read_text()


def test_the_report_is_one_escaped_file_that_needs_no_network(out):
    main(["report", str(out)])
    page = (out / "report.html").read_text()
    assert "<script" not in page and "<img src=http" not in page
    assert page.count("&lt;script&gt;") > 10
    sources = re.findall(r'\b(?:src|href)="([^"]*)"', page)
    assert len(sources) == 3 and all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "@import" not in page and "url(" not in page
    for words in ("ppo (bandit)", "0.60 ±0.14", "≤1.8", "Sample texts", "Settings", "highest gold score"):
        assert words in page
    assert "-0.00" not in page
    names = {file.name for file in (out / "plots").iterdir()}
    assert names == {"reviews-frontier.png", "reviews-win-rate.png", "reviews-learning-curves.png"}


def test_a_folder_without_results_is_told(tmp_path):
    with pytest.raises(UserError, match="holds no finished run"):
        write_report(tmp_path, [])


def test_colors_are_the_same_in_every_figure_and_never_shared(out):
    series = gather(out, write_results(out))
    style = styles(series)
    assert style == styles(series[::-1])
    assert len(set(style.values())) == len(style) == 3
    made = figures(series)
    assert set(made) == {("reviews", kind) for kind in ("win-rate", "frontier", "learning-curves")}
    for figure in made.values():
        drawn = {line.get_color() for ax in figure.axes for line in ax.lines}
        assert style["ppo"][0] in drawn


def test_unknown_algorithms_get_colors_of_their_own():
    from lm_envs.benchmarks.report.series import Series

    names = ["ppo", "best-of-4", "best-of-16", "mine", "yours"]
    style = styles([Series("t", name, (), Path()) for name in names])
    assert len({color for color, _ in style.values()}) == len(names)


def test_labels_do_not_overlap_and_stay_inside(out):
    from matplotlib.text import Annotation

    figure = figures(gather(out, write_results(out)))["reviews", "frontier"]
    figure.draw_without_rendering()
    for ax in figure.axes:
        boxes = [t.get_window_extent() for t in ax.texts if isinstance(t, Annotation) and t.get_text()]
        assert len(boxes) == 4
        assert all(figure.bbox.contains(*box.min) and figure.bbox.contains(*box.max) for box in boxes)
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_shown_prompts_are_the_first_three_and_the_most_flattered():
    samples = {"ppo": [{"gold": 0.0, "proxy": p} for p in (9.0, 0.0, 0.0, 1.0, 5.0, 2.0)]}
    assert [i for i, _ in chosen_prompts(samples)] == [0, 1, 2, 4]
    unjudged = {"ppo": [{"gold": None, "proxy": 1.0}] * 5}
    assert [i for i, _ in chosen_prompts(unjudged)] == [0, 1, 2]


def test_what_is_known_exactly_has_columns_of_its_own(tmp_path):
    write(tmp_path, [result("ppo", 0, 0.6, 4.0, [1.0], regret=0.0123, frontier_gap=0.2), result("sft", 0, 0.1, 0, [1])])
    write_results(tmp_path)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0].endswith(",wall_s,regret,frontier_gap")
    assert lines[1].endswith(",3.21,0.0123,0.2") and lines[2].endswith(",3.21,,")


def test_a_corpus_score_has_a_column_where_there_is_one(tmp_path):
    write(tmp_path, [result("sft", 0, 1.0, 0.0, [0.5, 0.5], corpus=20.0), result("ppo", 0, 2.0, 1.0, [1.0, 1.0])])
    rows = list(csv.DictReader((write_results(tmp_path), tmp_path / "results.csv")[1].open()))
    assert [row["corpus"] for row in rows] == ["20", ""] and list(rows[0]) == [*COLUMNS, "corpus"]


def test_the_title_says_on_how_many_prompts(tmp_path):
    write(tmp_path, [result("ppo", 0, 0.6, 4.0, [1.0], prompts=1024), result("sft", 0, 0.1, 0, [1.0], prompts=1024)])
    assert title(table(write_results(tmp_path))) == "1,024 test prompts, mean over seeds"
    write(tmp_path, [result("a2c", 0, 0.6, 4.0, [1.0], prompts=12)])
    assert title(table(write_results(tmp_path))) == "Test prompts, mean over seeds"


def test_all_algorithms_together_can_be_told_apart():
    from lm_envs.benchmarks.report.series import Series, styles
    from lm_envs.benchmarks.run.names import expanded

    found = styles([Series("reviews", name, (), Path()) for name in expanded(["all"])])
    assert len(found) == len(set(found.values())) > 10


@pytest.mark.parametrize(("prompts", "seeds"), [(1, 1), (99, 3), (100, 2), (100, 3), (None, 3)])
def test_few_prompts_and_few_seeds_are_said(prompts, seeds):
    known = dict.fromkeys(results.NUMBERS, 0.0) | {"regret": math.nan, "human": math.nan}
    line = results.Line("reviews", "ppo", tuple(range(seeds)), known, known, False, prompts)
    told = " ".join(results.footnotes([line]))
    assert (f"Measured on {prompts} test prompt" in told) == (prompts is not None and prompts < 100)
    exact = results.Line("enumerable", "ppo", (0, 1, 2), known | {"regret": 0.0}, known, False, prompts)
    assert "Measured on" not in " ".join(results.footnotes([exact]))  # exact expectations need no samples
    assert ("Fewer than 3 seeds" in told) == (seeds < 3)
    assert "1 test prompts" not in told
    many = results.Line("reviews", "sft", (0, 1, 2), known, known, False, 1000)  # the fewest of several are told
    assert (f"Measured on {prompts} test prompt" in " ".join(results.footnotes([many, line]))) == (prompts in (1, 99))


@pytest.mark.parametrize(
    ("sampled", "axis"), [((0, 0), "trained_tokens"), ((0, 90), "trained_tokens"), ((80, 90), "tokens")]
)
def test_learning_curves_of_a_method_that_samples_nothing_count_trained_tokens(sampled, axis):
    class Known:
        def __init__(self, last):
            self.last = last

        def curve(self, name, x="tokens"):
            ends = {"tokens": self.last, "trained_tokens": 50}
            return [([0, ends[x]], [0.0, 1.0])] if name == "proxy" else []

    assert plots._progress([Known(last) for last in sampled])[0] == axis


@pytest.mark.parametrize(
    ("golds", "text"),
    [
        ((0.5, 0.7), "0.60 ±0.14"),
        ((0.5, 0.506), "0.503 ±0.004"),
        ((0.5, 0.5004), "0.5002 ±0.0003"),
        ((0.5, 0.5), "0.50 ±0"),
        ((0.5, 0.5 + 1e-9), "0.50 ±0"),
    ],
)
def test_a_small_spread_has_digits_enough(golds, text):
    line = table([result("ppo", seed, gold, 1.0, [1.0]) for seed, gold in enumerate(golds)])[0]
    assert cell(line, next(column for column in SHOWN if column.name == "gold")) == text


def test_a_tie_with_sft_has_no_winner():
    rows = [result(name, 0, gold, 1.0, [1.0, 0.0]) for name, gold in (("sft", 0.25), ("best-of-4", 0.25), ("ppo", 0.1))]
    (first, *_) = answers(rows)
    assert first.startswith("No method's gold score is above SFT's 0.25; best-of-4 comes nearest, with 0.25")
    assert answers([rows[0], rows[1] | {"gold": 0.26}])[0].startswith("best-of-4 reaches the highest gold score, 0.26")


def test_every_method_is_compared_with_each_other():
    rng = np.random.default_rng(0)
    prompts = rng.normal(size=40)
    rows = []
    for name, mean in (("sft", 0.0), ("ppo", 0.02), ("mine", 1.0)):
        for seed in range(5):
            golds = mean + prompts + 0.1 * rng.normal(size=40) + 0.02 * rng.normal()
            rows.append(result(name, seed, float(golds.mean()), 1.0, [1.0] * 40) | {"golds": golds.tolist()})
    found = _differences(rows)
    assert [ours for ours, _ in found] == ["sft", "ppo", "mine"]
    texts = {ours: cells for ours, cells in found}
    assert [cells[place] for place, (_, cells) in enumerate(found)] == [("–", False)] * 3
    (over_sft, better), (over_ppo, _), _ = texts["mine"]
    assert better and re.fullmatch(r"(1\.\d\d|0\.9\d)\n\[\d\.\d\d, 1\.\d\d\]\np < 0\.001", over_sft)
    gap = np.mean([row["gold"] for row in rows[10:]]) - np.mean([row["gold"] for row in rows[5:10]])
    assert float(over_ppo.split()[0]) == pytest.approx(gap, abs=0.006)
    assert texts["ppo"][2][0].startswith("-") and not texts["ppo"][2][1] and not texts["ppo"][0][1]
    assert _differences(rows[:5]) == []
