"""The report of ``lm-envs data check``: a file's convention, its usable rows, their lengths, and every bad row."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text as Styled

from lm_envs.data.conventions import Example, Kind
from lm_envs.data.dataset import Examples
from lm_envs.data.packed import tokenise
from lm_envs.model.chat import Text
from lm_envs.model.text import Codec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PERCENTILES = (0, 50, 95, 99, 100)
_DUPLICATES = 10  # shown
_BAD = 10  # shown, where not all are asked for


@dataclass
class Report:
    """Facts about a file; they grow by a few numbers a row, not by texts."""

    data: Examples
    unit: str = "characters"
    usable: int = 0
    lengths: dict[str, array[int]] = field(default_factory=dict)  # of prompt, completion, together: a number a text
    splits: Counter[str] = field(default_factory=Counter)  # rows by their column "split"
    labels: Counter[int] = field(default_factory=Counter)
    duplicates: int = 0  # rows that say what an earlier one did
    repeats: list[tuple[str, str]] = field(default_factory=list)  # the first of them: where, and where before
    prompts: int = 0  # different ones


def check(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    kind: Kind | None = None,
    max_rows: int | None = None,
    max_length: int | None = None,
) -> Report:
    """Read a source to its end as training would; errors are those of :class:`~lm_envs.data.dataset.Examples`, and bad
    rows are none.

    Args:
        tokenizer: counts lengths, which are in characters without one; rows that it cannot read are bad.
        kind: the use of the rows; None is what they are.
        max_length: tokens of prompt and completion; longer rows are bad.
    """
    data = Examples(source, kind, "skip", max_rows)
    report = Report(data, "characters" if tokenizer is None else "tokens")
    seen: dict[int, int] = {}
    prompts: set[int] = set()
    for example, prompt, completions in _measured(data, tokenizer, max_length):
        report.usable += 1
        report.splits[example.split] += 1
        report.labels[example.label] += 1
        for length in completions or [0]:
            found = {"prompt": prompt} if prompt else {}
            found |= {"completion": length, "together": prompt + length} if completions else {}
            for name, number in found.items():
                report.lengths.setdefault(name, array("q")).append(number)
        prompts.add(_hash(example.key))
        same = _hash(repr((example.prompt, example.completions, example.ranks, example.label)))
        if same in seen:
            report.duplicates += 1
            if len(report.repeats) < _DUPLICATES:
                unit = example.where.split(" ")[0]
                report.repeats.append((example.where, f"{unit} {seen[same]}"))
        else:
            seen[same] = int(example.where.split(" ")[1])
    report.prompts = len(prompts)
    return report


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _measured(
    data: Examples, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None
) -> Iterator[tuple[Example, int, list[int]]]:
    """Yield usable rows with the length of the prompt and of each completion."""
    if tokenizer is None:
        for example in data:
            yield example, _characters(example.prompt), [_characters(text) for text in example.completions]
        return
    for found in tokenise(data, Codec(tokenizer), data.rejected, max_length):
        yield found.example, len(found.prompt), [len(ids) for ids in found.completions]


def _characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)


def render(report: Report, all_bad: bool = False) -> RenderableType:
    """Render the report for the terminal, with the first :data:`_BAD` bad rows, or all that are kept."""
    data, bad = report.data, report.data.rejected
    head = Table.grid(padding=(0, 2))
    other = [name for name in data.columns if name not in data.convention.columns]
    head.add_row("file", escape(f"{data.source} ({data.format})"))
    head.add_row("holds", f"[bold]{data.kind}[/], in the convention [bold]{data.convention.name}[/]")
    columns = ", ".join(data.convention.columns) + (f"; also {', '.join(other)}" if other else "")
    head.add_row("columns", escape(columns))
    share = f" ({100 * report.usable / data.read:.1f} %)" if data.read else ""
    color = "green" if not bad.count else "yellow" if report.usable else "red"
    head.add_row("rows", f"{data.read:,}, of them [{color}]{report.usable:,} usable{share}[/], {bad.count:,} bad")
    if report.labels.keys() & {0, 1} and data.kind == "judgments":
        counts = f"{report.labels[1]:,} true and {report.labels[0]:,} false"
        head.add_row("labels", f"{counts}: dpo --loss kto learns from both, sft from the true ones")
    if data.unwanted:
        head.add_row("unwanted", f"{data.unwanted:,} more are labeled false, which sft leaves out")
    head.add_row("prompts", f"{report.prompts:,} different")
    if report.duplicates:
        shown = ", ".join(f"{later} as {first}" for later, first in report.repeats[:3])
        more = ", ..." if report.duplicates > 3 else ""
        head.add_row("duplicates", f"[yellow]{report.duplicates:,}[/] rows say what an earlier one did: {shown}{more}")
    if any(report.splits.keys() - {""}):
        head.add_row("split", ", ".join(f"{name or 'none'} {count:,}" for name, count in report.splits.items()))
    parts: list[RenderableType] = [head]
    if report.lengths:
        table = Table(report.unit, "min", "median", "95 %", "99 %", "max", "mean", box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for name, found in report.lengths.items():
            values = np.frombuffer(found, dtype=np.int64)
            numbers = [*np.percentile(values, _PERCENTILES, method="higher"), values.mean()]
            table.add_row(name, *(f"{number:,.0f}" for number in numbers))
        parts += ["", table]
    if bad.count:
        parts += ["", _reasons(report)]
        listed = bad.rows if all_bad else bad.rows[:_BAD]
        parts += [Styled(f"  {one.where}: {one.reason}") for one in listed]
        if bad.count > len(listed):
            how = "" if all_bad else " (--all-bad lists them)"
            parts.append(Styled(f"  ... and {bad.count - len(listed):,} more{how}"))
    return Group(*parts)


def _reasons(report: Report) -> str:
    """Count bad rows by kind, where a kind has a name."""
    words = {"empty": "empty", "same text": "chosen and rejected alike", "that fit": "too long", "not JSON": "not JSON"}
    found = Counter(
        next((name for sign, name in words.items() if sign in one.reason), "other") for one in report.data.rejected.rows
    )
    return "bad rows: " + ", ".join(f"{count:,} {name}" for name, count in found.most_common())


def show(report: Report, *, all_bad: bool = False) -> None:
    """Print a report."""
    console = Console(emoji=False)
    if not console.is_terminal:
        console = Console(emoji=False, width=160, soft_wrap=True)
    console.print(render(report, all_bad), highlight=False)
