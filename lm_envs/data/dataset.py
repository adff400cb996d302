"""Data of the user's own: prompts, demonstrations and preferences, from any source in any of the field's conventions.

:class:`Data` reads a source in a stream and says what its rows mean; :mod:`lm_envs.data.tokenizing` makes token ids of
them. Bad rows stop everything with file and line, or are passed over, counted and listed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lm_envs.data.conventions import (
    CONVENTIONS,
    BadRow,
    Convention,
    Example,
    Kind,
    as_kind,
    decode_cells,
    recognise,
)
from lm_envs.data.sources import Row, format_of, read_rows
from lm_envs.data.splits import SplitColumn

OnBad = Literal["raise", "skip"]

_SPENT = frozenset({"prompt", "messages", "completions", "split"})  # columns that have their say otherwise
_PEEK = 100  # rows that decide which convention a source is in
LISTED = 10_000  # bad rows that are kept; more are counted


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used."""

    where: str
    reason: str


@dataclass
class Rejected:
    """What to do with bad rows, and those there were.

    Attributes:
        source: whose rows, for messages.
        on_bad: "raise" stops at the first, "skip" passes them over.
        count: how many were passed over.
        rows: those, the first :data:`LISTED` of them.
    """

    source: str | Path
    on_bad: OnBad
    count: int = 0
    rows: list[Bad] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.on_bad not in ("raise", "skip"):
            raise ValueError(f"on_bad must be 'raise' or 'skip', got {self.on_bad!r}")

    def add(self, where: str, reason: str) -> None:
        """One more.

        Raises:
            ValueError: they are to raise; the message says source and row.
        """
        if self.on_bad == "raise":
            raise ValueError(f"{self.source}, {where}: {reason}")
        self.count += 1
        if len(self.rows) < LISTED:
            self.rows.append(Bad(where, reason))

    def clear(self) -> None:
        """Forget them."""
        self.count, self.rows = 0, []


@dataclass(frozen=True)
class Item:
    """An example and where it stands.

    Attributes:
        split: the row's column ``split``, None where there is none.
        columns: what else the row holds beside the prompt, for rewards.
    """

    example: Example
    where: str
    split: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


class Data:
    """A source's usable rows, in a stream: iterating reads it from the start.

    Args:
        source: a file, a folder, or a name on the hub; see :func:`~lm_envs.data.sources.read_rows`.
        kind: what its rows are wanted as, see :func:`~lm_envs.data.conventions.as_kind`; None takes them as what they
        are. on_bad: "raise" stops at the first bad row, "skip" passes over it.
        max_rows: read no more than the first of them.

    Attributes:
        format: of the source.
        convention: that of most of the first rows.
        columns: of the row by which that was told.
        kind: what the rows are read as.
        rejected: the bad rows of the last pass.
        read: rows of the last pass, bad ones included.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the source needs the extra "data".
        ValueError: no row is in a convention that is known, or one that has what is wanted; while iterating, a bad row
            that is to raise, or a source that breaks off.
    """

    def __init__(
        self, source: str | Path, kind: Kind | None = None, on_bad: OnBad = "raise", max_rows: int | None = None
    ) -> None:
        self.source, self._max_rows = source, max_rows
        self.format = format_of(source)
        self.rejected, self.read = Rejected(source, on_bad), 0
        self.convention, self.columns = self._recognise()
        self.kind: Kind = kind or self.convention.kind
        wanted = {"prompts": 0, "demonstrations": 1, "preferences": 2}
        if wanted[self.kind] > wanted[self.convention.kind]:
            raise ValueError(
                f"{source} holds {self.convention.kind} ({self.convention.name}), and {self.kind} are wanted: rows "
                f"with {' or '.join(c.name for c in CONVENTIONS if wanted[c.kind] >= wanted[self.kind])}"
            )

    def _rows(self) -> Iterator[Row]:
        rows = itertools.islice(read_rows(self.source), self._max_rows)
        if self.format != "CSV":
            return rows
        return (_decoded(row) for row in rows)

    def _recognise(self) -> tuple[Convention, tuple[str, ...]]:
        votes: Counter[Convention] = Counter()
        seen: dict[Convention, tuple[str, ...]] = {}
        strange: Row | None = None
        for row in itertools.islice(self._rows(), _PEEK):
            found = None if row.values is None else recognise(row.values)
            if found is None:
                strange = strange or row
                continue
            votes[found] += 1
            seen.setdefault(found, tuple(row.values or ()))
        if not votes:
            known = "; ".join(convention.name for convention in CONVENTIONS)
            if strange is None:
                raise ValueError(f"{self.source}: there is not one row; expected columns of one of these: {known}")
            if strange.values is None:
                raise ValueError(f"{self.source}, {strange.where}: {strange.problem}")
            has = ", ".join(map(repr, strange.values)) or "(none)"
            raise ValueError(f"{self.source}, {strange.where}: the columns {has} are in no known convention: {known}")
        best = votes.most_common(1)[0][0]
        return best, seen[best]

    def __iter__(self) -> Iterator[Item]:
        splits = SplitColumn()
        self.rejected.clear()
        self.read = 0
        for row in self._rows():
            self.read += 1
            try:
                item = self._item(row, splits)
            except BadRow as error:
                self.rejected.add(row.where, str(error))
                continue
            yield item

    def _item(self, row: Row, splits: SplitColumn) -> Item:
        if row.values is None:
            raise BadRow(row.problem)
        missing = [name for name in self.convention.columns if name not in row.values]
        if missing:
            has = ", ".join(map(repr, row.values)) or "nothing"
            raise BadRow(f"there is no {missing[0]!r} here, unlike in most rows; this one has {has}")
        example = as_kind(self.convention.read(row.values), self.kind)
        try:
            split = splits.read(row.values, "")
        except ValueError as error:
            raise BadRow(str(error).removeprefix(": ")) from None
        columns = {name: value for name, value in row.values.items() if name not in _SPENT}
        return Item(example, row.where, split if splits.present else None, columns)


def _decoded(row: Row) -> Row:
    if row.values is None:
        return row
    try:
        return Row(row.where, decode_cells(row.values))
    except BadRow as error:
        return Row(row.where, None, str(error))
