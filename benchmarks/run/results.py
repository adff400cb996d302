"""The results of a comparison: ``results.csv`` with a row per run, and the table over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_envs.algos.engine import cost
from lm_envs.benchmarks.measure.samples import GREEDY, standard_error
from lm_envs.benchmarks.measure.statistics import Estimate, nested_mean
from lm_envs.benchmarks.run.names import is_control, run_name
from lm_envs.benchmarks.run.storage import finished, write_lines
from lm_envs.data.splits import ENOUGH_PROMPTS

COLUMNS = (
    *("task", "algorithm", "seed", "win_rate", "win_rate_se", "gold", "proxy", "kl", "length", "distinct_2"),
    *("tokens_generated", "reward_calls", "wall_s"),
)
COSTS = tuple(name for name in cost.COLUMNS if name not in COLUMNS)
EXACT = ("regret", "frontier_gap", "gradient_cosine", "gradient_cosine_se")  # of tasks that are solved exactly
# Columns of results.csv if a value is known. "corpus" is the score of sampled responses, the next three of greedy ones.
KNOWN_AT_TIMES = (*COSTS, "simulated", "perplexity", "corpus", *GREEDY, *EXACT, "kl_coef", "kl_bound")
EXTRA = ("gold_positive", "proxy_positive", *KNOWN_AT_TIMES)  # the first two: for judges and rewards with a threshold
NUMBERS = (*COLUMNS[5:], *EXTRA)  # averaged over seeds; the win-rate has an error of its own

PER_PROMPT = {"win_rate": "wins", "gold": "golds", "simulated": "votes"}
"""Names of the lists in a result that hold a value per test prompt."""
_REPORTED = ("config.json", "metrics.jsonl", "samples.jsonl", "result.json")
ENOUGH_SEEDS = 3


def run_folder(row: Mapping[str, Any]) -> str:
    """Return the folder of a result's run within its comparison."""
    return run_name(row["task"], row["algorithm"], row["seed"], row.get("task_seed", 0))


def run_key(row: Mapping[str, Any]) -> tuple[int, int]:
    """Return which run of its method a result is: the seed of the task's models, 0 for its own, and the training
    seed."""
    return row.get("task_seed", 0), row["seed"]


def number(value: Any) -> float:
    """Return a number of a result, NaN for JSON's null."""
    return math.nan if value is None else float(value)


def collect_results(out: Path, tasks: Sequence[str] = (), algorithms: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the results of all finished runs in a folder, by task, algorithm and seed: in the order of these names,
    then in the order in which they were finished."""
    paths = sorted(out.glob("*/*/seed-*/result.json"), key=lambda path: path.stat().st_mtime_ns)
    rows = [row for path in paths if (row := finished(path.parent, _REPORTED)) is not None]
    tasks = list(dict.fromkeys([*tasks, *(row["task"] for row in rows)]))
    algorithms = list(dict.fromkeys([*algorithms, *(row["algorithm"] for row in rows)]))
    return sorted(rows, key=lambda r: (tasks.index(r["task"]), algorithms.index(r["algorithm"]), *run_key(r)))


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write ``results.csv``: the columns :data:`COLUMNS`, then those of :data:`KNOWN_AT_TIMES` that are known for some
    run, then the means of the parts of a reward that is a sum, and pass@k. An unknown number is an empty cell."""
    known = [name for name in KNOWN_AT_TIMES if any(not math.isnan(number(row.get(name))) for row in rows)]
    if not _differ((row["task"], row.get("kl_coef")) for row in rows):
        known = [name for name in known if name != "kl_coef"]
    known += dict.fromkeys(name for row in rows for name in row if name.startswith(("part_", "pass@")))
    known += [name for name in ("task_seed", "collapsed", "stop_rule") if any(row.get(name) for row in rows)]
    write_lines(path, [{name: written(value) for name, value in row.items()} for row in rows], (*COLUMNS, *known))


def written(value: Any) -> Any:
    """Return a value as a CSV has it: six digits, nothing for NaN."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def _differ(coefs: Iterable[tuple[str, float | None]]) -> bool:
    """Return whether the methods of a task differ in their KL coefficient; those without one do not count."""
    known = {pair for pair in coefs if not math.isnan(number(pair[1]))}
    return len(known) > len({task for task, _ in known})


@dataclass(frozen=True)
class Line:
    """A line of the table: one algorithm on one task, over its seeds.

    ``spread`` is the standard deviation over the seeds (n - 1), NaN for one; for ``win_rate`` the standard error over
    prompts and seeds. ``estimates`` has the win-rate and the gold with their intervals. ``prompts`` is the number of
    test prompts, None without any.
    """

    task: str
    algorithm: str
    seeds: tuple[int, ...]
    mean: dict[str, float]
    spread: dict[str, float]
    kl_is_bound: bool
    prompts: int | None = None
    estimates: dict[str, Estimate] = field(default_factory=dict)
    collapsed: dict[str, str] = field(default_factory=dict)  # how, by the seeds of runs that did
    stopped: dict[str, str] = field(default_factory=dict)  # by which rule, by the seeds of runs that one ended
    versions: int = 1  # of the task's models

    @property
    def title(self) -> str:
        """The algorithm's name, with how many of its runs collapsed."""
        if not self.collapsed:
            return self.algorithm
        return f"{self.algorithm} (collapsed{f' {len(self.collapsed)} of {n}' if (n := len(self.seeds)) > 1 else ''})"


def by_method(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Group rows by task and algorithm, in their order."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["task"], row["algorithm"]), []).append(row)
    return cells


def table(rows: Sequence[dict[str, Any]]) -> list[Line]:
    """Average results over seeds, in the order of the rows."""
    return [_line(task, algorithm, found) for (task, algorithm), found in by_method(rows).items()]


def _line(task: str, algorithm: str, rows: list[dict[str, Any]]) -> Line:
    mean, spread = {}, {}
    for name in ("win_rate", *NUMBERS):
        values = np.array([number(row.get(name) if name in EXTRA else row[name]) for row in rows])
        mean[name] = float(values.mean())
        spread[name] = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    estimates = {name: estimate_of(rows, outcomes(rows, name)) for name in PER_PROMPT}
    spread["win_rate"] = estimates["win_rate"].error
    human = np.array([outcome for outcome in rows[0].get("human", ()) if not math.isnan(outcome)])
    mean["human"] = float(human.mean()) if len(human) else math.nan
    spread["human"] = standard_error(human)
    bound = any(row.get("kl_is_bound", False) for row in rows)
    seeds, versions = tuple(row["seed"] for row in rows), len({row.get("task_seed", 0) for row in rows})
    fell, stopped = ({_seeds_of(row): row[k] for row in rows if row.get(k)} for k in ("collapsed", "stop_rule"))
    return Line(task, algorithm, seeds, mean, spread, bound, rows[0].get("prompts"), estimates, fell, stopped, versions)


def _seeds_of(row: Mapping[str, Any]) -> str:
    task_seed, seed = run_key(row)
    return f"seed {seed}" if not task_seed else f"seed {seed}, task seed {task_seed}"


def estimate_of(rows: Sequence[Mapping[str, Any]], values: NDArray[np.float64]) -> Estimate:
    """Estimate the mean of the values ``(S, P)`` of these runs over new models of the task, seeds and prompts, as far
    as there are several."""
    return nested_mean(values, [row.get("task_seed", 0) for row in rows])


def outcomes(rows: Sequence[dict[str, Any]], name: str) -> NDArray[np.float64]:
    """Return a column of results per prompt, ``(runs, prompts)``; where results do not have it for the same number of
    prompts, the column itself, ``(runs, 1)``."""
    lists = [row.get(PER_PROMPT.get(name, "")) or [] for row in rows]
    if len({len(values) for values in lists}) != 1 or not lists[0]:
        lists = [[row.get(name)] for row in rows]
    return np.array([[number(value) for value in values] for values in lists])


@dataclass(frozen=True)
class Column:
    """A column of the table: its title, the format of its numbers, and its meaning."""

    name: str
    title: str
    digits: int
    meaning: str
    percent: bool = False
    spread: bool = True
    interval: bool = False


def _aside(name: str, title: str, digits: int, meaning: str, percent: bool = False) -> Column:
    """A column without a spread, which a narrow terminal leaves out."""
    return Column(name, title, digits, meaning, percent, spread=False)


SHOWN = (
    Column(
        "win_rate",
        "win-rate %",
        1,
        "of the gold judge, against SFT on the same test prompts, ties half",
        percent=True,
        interval=True,
    ),
    Column(
        "simulated",
        "simulated %",
        1,
        "votes of simulated annotators for it, against SFT on the same test prompts; no method learns from them",
        percent=True,
        interval=True,
    ),
    Column("human", "people's win-rate %", 1, "of people, against SFT on the test prompts of a study, ties half", True),
    Column("gold", "gold", 2, "mean score of the judge, which no method trains on"),
    _aside("gold_positive", "gold + %", 1, "share of texts that the judge calls positive", percent=True),
    Column("proxy", "proxy", 2, "mean score of the reward that trains"),
    _aside("proxy_positive", "proxy + %", 1, "share that the reward model calls positive", percent=True),
    Column("corpus", "corpus", 1, "score of all responses together by the task's text metric (BLEU, ...)"),
    Column("corpus_greedy", "greedy", 2, "the same of the likeliest responses"),
    Column("corpus_gain", "over SFT", 2, "how much higher that is than SFT's"),
    _aside("corpus_gain_se", "±", 2, "standard error over prompts of that, paired bootstrap"),
    Column("kl", "KL", 1, "nats per sequence from SFT"),
    _aside("kl_coef", "β", 3, "KL coefficient that training starts with"),
    Column("regret", "regret", 4, "(J* - J) / (J* - J of SFT), exact: 0 is the optimum, 1 is SFT"),
    Column("frontier_gap", "frontier gap", 3, "score below the most possible at the same KL, exact"),
    Column(
        "gradient_cosine",
        "gradient cosine",
        3,
        "of the algorithm's mean first step, halfway to the optimum, with the exact policy gradient: 1 has no "
        "bias; estimated from 65,536 episodes in batches of the algorithm's size",
    ),
    _aside("length", "length", 1, "tokens per response"),
    _aside("distinct_2", "distinct-2", 2, "share of different token pairs over all responses"),
    _aside("perplexity", "perplexity", 1, "of the responses under the reference, per token"),
    _aside("tokens_generated", "tokens", 0, "sampled, in training and for the test responses"),
    _aside("reward_calls", "reward calls", 0, "in training, and at inference by best-of-n"),
    _aside("wall_s", "seconds", 0, "of training and of sampling the test responses"),
    _aside("comparisons", "comparisons", 0, "pairs that annotators judged, for the method or for its reward model"),
    _aside("given_tokens", "given tokens", 0, "of compared responses that were there before the run"),
    _aside("scored_tokens", "scored tokens", 0, "of prompts and responses read by the reward, reference or own critic"),
    _aside("episodes", "episodes", 0, "responses sampled, in training and for the test"),
    _aside("trained_tokens", "trained tokens", 0, "response tokens with a gradient, counted in each pass over them"),
)


def plain(value: float, digits: int) -> str:
    """Format a number as ``1,234.50``, never with a negative zero."""
    return f"{round(value, digits) + 0.0:,.{digits}f}"


def enough_digits(spread: float, digits: int, most: int = 3) -> int:
    """Return with how many decimals a spread is no zero: ``digits`` or more, or ``digits`` if it takes over ``most``
    more."""
    return next((n for n in range(digits, digits + most + 1) if round(spread, n)), digits)


def cell(line: Line, column: Column) -> str:
    """Format a cell of the table: ``0.58 ±0.03``, ``81.2 [75, 87]``, a dash for an unknown value, ≤ for a bound."""
    value, spread = line.mean[column.name], line.spread[column.name]
    if math.isnan(value):
        return "–"
    factor = 100 if column.percent else 1
    spread_shown = column.spread and not column.interval and not math.isnan(spread)
    digits = enough_digits(spread * factor, column.digits) if spread_shown else column.digits
    text = plain(value * factor, digits)
    if column.name == "kl" and line.kl_is_bound:
        return f"≤{text}"
    if column.interval:
        return text + interval(line.estimates[column.name], column.digits - 1, factor, most=factor)
    if spread_shown:
        text += f" ±{spread * factor:.{digits}f}" if round(spread * factor, digits) else " ±0"
    if column.name == "kl" and not math.isnan(line.mean["kl_bound"]):
        text += f" (≤{plain(line.mean['kl_bound'], column.digits)})"
    return text


def interval(estimate: Estimate, digits: int, factor: float = 1, most: float = math.inf) -> str:
    """Format a 95 % interval as `` [75, 87]``; nothing where its error is not known.

    Args:
        factor: of both ends.
        most: the largest possible value; the smallest is then 0.
    """
    if math.isnan(estimate.error):
        return ""
    low, high = factor * estimate.low, factor * estimate.high
    if most < math.inf:
        low, high = max(low, 0.0), min(high, most)
    return f" [{plain(low, digits)}, {plain(high, digits)}]"


def shown(lines: Sequence[Line]) -> list[Column]:
    """Return the columns with information: known for a line, for given data not 0 in all, and for the KL coefficient
    not the same in all."""

    def told(column: Column) -> bool:
        values = [line.mean[column.name] for line in lines if not math.isnan(line.mean[column.name])]
        if column.name == "kl_coef":
            return _differ((line.task, line.mean["kl_coef"]) for line in lines)
        return any(values) if column.name in ("comparisons", "given_tokens") else bool(values)

    return [column for column in SHOWN if told(column)]


_LAYERS = {"models": "the task's models", "seeds": "training seeds", "prompts": "test prompts"}
_FIXED = {
    "seeds": "other training seeds",
    "prompts": "other prompts",
    "models": "other models of the task (SFT, reward model): there is one version",
}


def footnotes(lines: Sequence[Line]) -> list[str]:
    """Return the notes that a reader of the table needs."""
    notes = ["± is the standard deviation over seeds."] if any(len(line.seeds) > 1 for line in lines) else []
    if any(not math.isnan(line.mean["human"]) for line in lines):
        notes.append("± of people's win-rates is the standard error over prompts.")
    if layers := {line.estimates["win_rate"].layers for line in lines if line.estimates} - {()}:
        counted = " or ".join(" and ".join(_LAYERS[layer] for layer in each) for each in sorted(layers))
        fixed = ", ".join(told for layer, told in _FIXED.items() if not any(layer in each for each in layers))
        notes.append(f"[ ]: 95 % interval over {counted}, by Student's t. Not in it: {fixed}.")
    if several := [line for line in lines if line.versions > 1]:
        part = np.array([line.estimates["win_rate"].models for line in several])
        told = f"The task's models (SFT, reward model): {max(line.versions for line in several)} versions."
        if len(part := part[~np.isnan(part)]):
            ends = " to ".join(f"{100 * end:.0f}" for end in dict.fromkeys((part.min().round(2), part.max().round(2))))
            told = f"{told[:-1]}, which make up {ends} % of the variance of a method's win-rate."
        notes.append(told)
    sampled = [line for line in lines if not is_control(line.task) and math.isnan(line.mean["regret"])]  # not exact
    fewest = min((line.prompts for line in sampled if line.prompts is not None), default=ENOUGH_PROMPTS)
    if fewest < ENOUGH_PROMPTS:
        prompts = f"{fewest} test prompt{'s' * (fewest > 1)}, which tell only large differences apart"
        notes.append(f"Measured on {prompts}: more come from a larger --test-prompts, or a file with more of them.")
    if min(len(line.seeds) for line in lines) < ENOUGH_SEEDS:
        notes.append(f"Fewer than {ENOUGH_SEEDS} seeds: differences between methods may be those of the seeds.")
    if any(not line.kl_is_bound and not math.isnan(line.mean["kl_bound"]) for line in lines):
        notes.append("The KL of best-of-n is measured on more samples; in parentheses the bound log n − (n−1)/n.")
    if any(line.kl_is_bound for line in lines):
        notes.append("≤: best-of-n's own log-probability is unknown; shown is the upper bound log n − (n−1)/n.")
    if any(is_control(line.task) for line in lines):
        notes.append("On control environments proxy is the return, and tokens and reward calls are steps.")
    if any(not math.isnan(line.mean["regret"]) for line in lines):
        notes.append("Where there is a regret, win-rate, gold, proxy, KL and length are exact expectations.")
    notes += [f"{line.algorithm} collapsed: {next(iter(line.collapsed.values()))}." for line in lines if line.collapsed]
    for line in lines:
        if whys := "; ".join(f"{seeds}: {why}" for seeds, why in line.stopped.items()):
            notes.append(f"{line.algorithm} stopped before its budget by a rule ({whys}).")
    if any(math.isnan(line.mean["gold"]) for line in lines if not is_control(line.task)):
        notes.append("There is no gold score and no win-rate where a task has no judge.")
    return notes


def title(lines: Sequence[Line]) -> str:
    """Return the title of the table: what the figures were measured on."""
    counts = {line.prompts for line in lines}
    if all(is_control(line.task) for line in lines):
        return "Test episodes, mean over seeds"
    number = f"{counts.pop():,} test" if len(counts) == 1 and None not in counts else "Test"
    return f"{number} prompts, mean over seeds"


def rich_table(lines: Sequence[Line], width: int = 160) -> Any:
    """Make the table for a terminal of this width; a narrow one has fewer columns, without the last ones first."""
    from rich.markup import escape
    from rich.table import Table

    columns, notes = shown(lines), footnotes(lines)
    texts = {column: [column.title, *(cell(line, column) for line in lines)] for column in columns}
    names = [["task", *(line.task for line in lines)], ["algorithm", *(line.title for line in lines)], ["seeds"]]
    room = width - 1 - sum(3 + max(map(len, column)) for column in (*names, *texts.values()))
    for column in [column for column in columns if not column.spread][::-1]:
        if room < 0:
            room += 3 + max(map(len, texts.pop(column)))
    if len(texts) < len(columns):
        notes.append("results.csv has more columns.")
    made = Table(header_style="bold", row_styles=["", "dim"], title=title(lines))
    made.title_justify = made.caption_justify = "left"
    made.add_column("task", overflow="fold")
    made.add_column("algorithm", style="bold", overflow="fold")
    made.add_column("seeds", justify="right")
    for column in texts:
        made.add_column(column.title, justify="right", no_wrap=True)
    for i, line in enumerate(lines):
        if i and lines[i - 1].task != line.task:
            made.add_section()
        cells = [found[i + 1] for found in texts.values()]
        made.add_row(escape(line.task), escape(line.title), str(len(line.seeds)), *cells)
    made.caption = "\n".join(notes)
    return made
