"""The results of a comparison: ``results.csv`` with a row per run, and the table over seeds."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm_envs.algos.engine import cost
from lm_envs.benchmarks.measure import greedy
from lm_envs.benchmarks.run.names import is_control
from lm_envs.benchmarks.run.storage import read_json
from lm_envs.data.splits import ENOUGH_PROMPTS
from lm_envs.files import write_atomic

COLUMNS = (
    "task",
    "algorithm",
    "seed",
    "win_rate",
    "win_rate_se",
    "gold",
    "proxy",
    "kl",
    "length",
    "distinct_2",
    "tokens_generated",
    "reward_calls",
    "wall_s",
)
EXACT = ("regret", "frontier_gap", "gradient_cosine", "gradient_cosine_se")  # of tasks that are solved exactly
COSTS = tuple(name for name in cost.COLUMNS if name not in COLUMNS)
# In results.csv where something is known. The corpus score is of sampled responses, the next three of the likeliest.
KNOWN_AT_TIMES = (*COSTS, "corpus", *greedy.COLUMNS, *EXACT, "kl_coef")
EXTRA = ("gold_positive", "proxy_positive", *KNOWN_AT_TIMES)  # the first two: of judges and rewards with a threshold
NUMBERS = (*COLUMNS[5:], *EXTRA)  # averaged over seeds; the win-rate has an error of its own


ENOUGH_SEEDS = 3


def number(value: Any) -> float:
    """A number of a result; JSON's null stands for NaN."""
    return math.nan if value is None else float(value)


def collect_results(out: Path) -> list[dict[str, Any]]:
    """The results of all finished runs in a folder, by task and algorithm in the order they were finished, then by
    seed.
    """
    paths = sorted(out.glob("*/*/seed-*/result.json"), key=lambda path: path.stat().st_mtime_ns)
    rows = [read_json(path) for path in paths]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    algorithms = list(dict.fromkeys(row["algorithm"] for row in rows))
    return sorted(rows, key=lambda r: (tasks.index(r["task"]), algorithms.index(r["algorithm"]), r["seed"]))


def in_order(rows: list[dict[str, Any]], tasks: Sequence[str], algorithms: Sequence[str]) -> list[dict[str, Any]]:
    """Rows in the order of the suite's names; names that it does not have come last."""

    def place(names: Sequence[str], name: str) -> int:
        return names.index(name) if name in names else len(names)

    return sorted(rows, key=lambda r: (place(tasks, r["task"]), place(algorithms, r["algorithm"]), r["seed"]))


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """``results.csv``, replaced as a whole; a number that is not known is an empty cell.

    It has the columns :data:`COLUMNS`, and behind them those of :data:`KNOWN_AT_TIMES` that are known of a run.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    known = [name for name in KNOWN_AT_TIMES if any(not math.isnan(number(row.get(name))) for row in rows)]
    if not _differ((row["task"], row.get("kl_coef")) for row in rows):
        known = [name for name in known if name != "kl_coef"]
    names = (*COLUMNS, *known)
    writer.writerow(names)
    for row in rows:
        values = [row.get(name) if name in KNOWN_AT_TIMES else row[name] for name in names]
        writer.writerow(["" if v is None or (isinstance(v, float) and math.isnan(v)) else _cell(v) for v in values])
    write_atomic(path, text.getvalue())


def _differ(coefs: Iterable[tuple[str, float | None]]) -> bool:
    """Whether the methods of a task differ in their KL coefficient; those that have none do not count."""
    known = {pair for pair in coefs if not math.isnan(number(pair[1]))}
    return len(known) > len({task for task, _ in known})


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


@dataclass(frozen=True)
class Line:
    """A line of the table: one algorithm on one task, over its seeds.

    Attributes:
        mean: of each column over the seeds.
        spread: standard deviation over the seeds (n - 1), NaN for one; for ``win_rate`` the standard error over
            **prompts** of the outcome averaged over the seeds, since all seeds answer the same prompts against the same
            SFT samples.
        prompts: test prompts that it was measured on, None where there are none.
    """

    task: str
    algorithm: str
    seeds: tuple[int, ...]
    mean: dict[str, float]
    spread: dict[str, float]
    kl_is_bound: bool
    prompts: int | None = None


def table(rows: Sequence[dict[str, Any]]) -> list[Line]:
    """Results averaged over seeds, in the order of the rows."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["task"], row["algorithm"]), []).append(row)
    return [_line(task, algorithm, found) for (task, algorithm), found in cells.items()]


def _line(task: str, algorithm: str, rows: list[dict[str, Any]]) -> Line:
    mean, spread = {}, {}
    for name in NUMBERS:
        values = np.array([number(row.get(name) if name in EXTRA else row[name]) for row in rows])
        mean[name] = float(values.mean())
        spread[name] = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    mean["win_rate"] = float(np.mean([number(row["win_rate"]) for row in rows]))
    spread["win_rate"] = _win_rate_se(rows)
    bound = any(row.get("kl_is_bound", False) for row in rows)
    seeds = tuple(row["seed"] for row in rows)
    return Line(task, algorithm, seeds, mean, spread, bound, rows[0].get("prompts"))


def _win_rate_se(rows: list[dict[str, Any]]) -> float:
    outcomes = [[number(w) for w in row.get("wins", [])] for row in rows]
    if len({len(outcome) for outcome in outcomes}) != 1 or len(outcomes[0]) < 2:
        return math.nan
    per_prompt = np.mean(outcomes, axis=0)
    return float(per_prompt.std(ddof=1) / math.sqrt(len(per_prompt)))


@dataclass(frozen=True)
class Column:
    """How a column of the table is called and written."""

    name: str
    title: str
    digits: int
    percent: bool = False
    spread: bool = True
    meaning: str = ""


SHOWN = (
    Column(
        "win_rate",
        "win-rate %",
        1,
        percent=True,
        meaning="of the gold judge, against SFT on the same test prompts, ties half",
    ),
    Column("gold", "gold", 2, meaning="mean score of the judge, which no method trains on"),
    Column(
        "gold_positive",
        "gold + %",
        1,
        percent=True,
        spread=False,
        meaning="share of texts that the judge calls positive",
    ),
    Column("proxy", "proxy", 2, meaning="mean score of the reward that trains"),
    Column(
        "proxy_positive",
        "proxy + %",
        1,
        percent=True,
        spread=False,
        meaning="share that the reward model calls positive",
    ),
    Column("corpus", "corpus", 1, meaning="score of all responses together by the task's text metric (BLEU, ...)"),
    Column("corpus_greedy", "greedy", 2, meaning="the same of the likeliest responses"),
    Column("corpus_gain", "over SFT", 2, meaning="how much higher that is than SFT's"),
    Column("corpus_gain_se", "±", 2, spread=False, meaning="standard error over prompts of that, paired bootstrap"),
    Column("kl", "KL", 1, meaning="nats per sequence from SFT"),
    Column("kl_coef", "β", 3, spread=False, meaning="KL coefficient that training starts with"),
    Column("regret", "regret", 4, meaning="(J* - J) / (J* - J of SFT), exact: 0 is the optimum, 1 is SFT"),
    Column("frontier_gap", "frontier gap", 3, meaning="score below the most possible at the same KL, exact"),
    Column(
        "gradient_cosine",
        "gradient cosine",
        3,
        meaning="of the algorithm's mean first step, half-way to the optimum, with the exact policy gradient: 1 has no "
        "bias; estimated from 65,536 episodes in batches of the algorithm's size",
    ),
    Column("length", "length", 1, spread=False, meaning="tokens per response"),
    Column("distinct_2", "distinct-2", 2, spread=False, meaning="share of different token pairs over all responses"),
    Column("tokens_generated", "tokens", 0, spread=False, meaning="sampled, in training and for the test responses"),
    Column("reward_calls", "reward calls", 0, spread=False, meaning="in training, and at inference by best-of-n"),
    Column("wall_s", "seconds", 0, spread=False, meaning="of training and of sampling the test responses"),
    Column(
        "comparisons",
        "comparisons",
        0,
        spread=False,
        meaning="pairs that annotators chose between, for the method itself or for the reward model that it uses",
    ),
    Column("given_tokens", "given tokens", 0, spread=False, meaning="of compared responses that were there before"),
    Column("episodes", "episodes", 0, spread=False, meaning="responses sampled, in training and for the test"),
    Column(
        "trained_tokens",
        "trained tokens",
        0,
        spread=False,
        meaning="response tokens with a gradient, as often as they were passed over",
    ),
)


def plain(value: float, digits: int) -> str:
    """``1,234.50``, and never a negative zero."""
    return f"{round(value, digits) + 0.0:,.{digits}f}"


_WIDE = 125  # characters that all of COLUMNS need
_EXTRA_WIDE = 12  # one of EXTRA


def cell(line: Line, column: Column) -> str:
    """A cell of the table: ``0.58 ±0.03``; a dash where nothing is known; a bound has its sign."""
    value, spread = line.mean[column.name], line.spread[column.name]
    if math.isnan(value):
        return "–"
    factor = 100 if column.percent else 1
    text = plain(value * factor, column.digits)
    if column.name == "kl" and line.kl_is_bound:
        return f"≤{text}"
    if column.spread and not math.isnan(spread):
        text += f" ±{spread * factor:.{column.digits}f}"
    return text


def shown(lines: Sequence[Line]) -> list[Column]:
    """The columns in which something is known; the KL coefficient where it differs between methods."""
    found = [column for column in SHOWN if not all(math.isnan(line.mean[column.name]) for line in lines)]
    differ = _differ((line.task, line.mean["kl_coef"]) for line in lines)
    return [column for column in found if differ or column.name != "kl_coef"]


def footnotes(lines: Sequence[Line]) -> list[str]:
    """What a reader of the table has to know."""
    notes = ["± is the standard deviation over seeds; for the win-rate, the standard error over prompts."]
    texts = [line for line in lines if not is_control(line.task)]
    fewest = min((line.prompts for line in texts if line.prompts is not None), default=ENOUGH_PROMPTS)
    if fewest < ENOUGH_PROMPTS:
        prompts = "1 test prompt" if fewest == 1 else f"{fewest} test prompts"
        notes.append(
            f"Measured on {prompts}: too few to tell methods apart. Give the prompts a split, or more of them."
        )
    if min(len(line.seeds) for line in lines) < ENOUGH_SEEDS:
        notes.append(f"Fewer than {ENOUGH_SEEDS} seeds: differences between methods may be those of the seeds.")
    if any(line.kl_is_bound for line in lines):
        notes.append("≤: best-of-n's own log-probability is unknown; shown is the upper bound log n − (n−1)/n.")
    if any(is_control(line.task) for line in lines):
        notes.append("On control environments proxy is the return, and tokens and reward calls are steps.")
    if any(not math.isnan(line.mean["regret"]) for line in lines):
        notes.append("Where there is a regret, win-rate, gold, proxy, KL and length are exact expectations.")
    if any(math.isnan(line.mean["gold"]) for line in lines if not is_control(line.task)):
        notes.append("There is no gold score and no win-rate where a task has no judge.")
    return notes


def title(lines: Sequence[Line]) -> str:
    """What the figures were measured on."""
    counts = {line.prompts for line in lines}
    if all(is_control(line.task) for line in lines):
        return "Test episodes, mean over seeds"
    number = f"{counts.pop():,} test" if len(counts) == 1 and None not in counts else "Test"
    return f"{number} prompts, mean over seeds"


def rich_table(lines: Sequence[Line], width: int = 160) -> Any:
    """The table for a terminal of so many characters; a narrow one gets fewer columns."""
    from rich.markup import escape
    from rich.table import Table

    columns = shown(lines)
    notes = footnotes(lines)
    if width < _WIDE + _EXTRA_WIDE * sum(column.name in EXTRA for column in columns):
        columns = [column for column in columns if column.spread]
        notes.append("results.csv has more columns.")
    made = Table(header_style="bold", row_styles=["", "dim"], title=title(lines))
    made.title_justify = made.caption_justify = "left"
    made.add_column("task", overflow="fold")
    made.add_column("algorithm", style="bold", overflow="fold")
    made.add_column("seeds", justify="right")
    for column in columns:
        made.add_column(column.title, justify="right", no_wrap=True)
    for before, line in zip([None, *lines[:-1]], lines, strict=True):
        if before is not None and before.task != line.task:
            made.add_section()
        values = [cell(line, column) for column in columns]
        made.add_row(escape(line.task), line.algorithm, str(len(line.seeds)), *values)
    made.caption = "\n".join(notes)
    return made
