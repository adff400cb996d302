"""A stream of examples from any source in any of the field's conventions.

A bad row raises with file and line, or is skipped, counted and listed.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lm_envs.data.conventions import (
    ASKED_FOR,
    CONVENTIONS,
    NEEDS,
    Convention,
    Example,
    Kind,
    as_kind,
    parsed,
    recognise,
)
from lm_envs.data.sources import Read, format_of, read_rows
from lm_envs.data.splits import SPLIT_NAMES
from lm_envs.model.chat import BadExample
from lm_envs.settings import short

OnBad = Literal["raise", "skip"]

_SPENT = frozenset({"prompt", "messages", "completions", "split"})  # columns that are not passed on to rewards
_PEEK = 100  # rows that decide a source's convention
LISTED = 10_000  # bad rows that are kept; others are only counted


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used."""

    where: str
    reason: str


@dataclass
class Rejected:
    """Bad rows, and what to do with them.

    Attributes:
        source: their source, for messages.
        on_bad: "raise" stops at the first, "skip" skips them.
        count: the number of skipped rows.
        rows: the first :data:`LISTED` of them.
    """

    source: str | Path
    on_bad: OnBad
    count: int = 0
    rows: list[Bad] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.on_bad not in ("raise", "skip"):
            raise ValueError(f"on_bad must be 'raise' or 'skip', got {self.on_bad!r}")

    def add(self, where: str, reason: str) -> None:
        """Add a bad row, or raise ValueError with source and row."""
        if self.on_bad == "raise":
            raise ValueError(f"{self.source}, {where}: {reason}")
        self.count += 1
        if len(self.rows) < LISTED:
            self.rows.append(Bad(where, reason))


class Examples:
    """A source's usable examples; iterating streams it from the start.

    Args:
        source: a file, a folder, or a name on the hub; see :func:`~lm_envs.data.sources.read_rows`.
        kind: the kind to read rows as, see :func:`~lm_envs.data.conventions.as_kind`; None for the convention's own.
        on_bad: "raise" stops at the first bad row, "skip" skips it.
        max_rows: read only this many rows.

    Attributes:
        format: of the source.
        convention, kind: the convention of most of the first rows, and the kind that rows are read as.
        columns: of the first row in that convention.
        rejected: the bad rows of the last pass.
        read, unwanted: number of rows in the last pass, bad ones included; and of those left out because demonstrations
            are imitated and their completion is labeled as unwanted.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the source needs the extra "data".
        ValueError: no row is in a known convention, or the convention lacks the wanted kind; while iterating, a bad
            row, or a damaged source.
    """

    def __init__(
        self, source: str | Path, kind: Kind | None = None, on_bad: OnBad = "raise", max_rows: int | None = None
    ) -> None:
        self.source, self._max_rows = source, max_rows
        self.format = format_of(source)
        self.rejected, self.read, self.unwanted = Rejected(source, on_bad), 0, 0
        if kind in ASKED_FOR:
            self.convention, self.columns, self.kind = ASKED_FOR[kind], ASKED_FOR[kind].columns, kind
            return
        self.convention, self.columns = self._recognise()
        self.kind = kind or self.convention.kind
        if NEEDS[self.kind] > NEEDS[self.convention.kind]:
            hint = "; dpo with the loss 'kto' learns from labels" if self.convention.kind == "judgments" else ""
            raise ValueError(
                f"{source} holds {self.convention.kind} ({self.convention.name}), and {self.kind} are wanted: rows "
                f"with {' or '.join(c.name for c in CONVENTIONS if NEEDS[c.kind] >= NEEDS[self.kind])}{hint}"
            )

    def _rows(self) -> Iterator[Read]:
        return itertools.islice(read_rows(self.source), self._max_rows)

    def _recognise(self) -> tuple[Convention, tuple[str, ...]]:
        votes: Counter[Convention] = Counter()
        seen: dict[Convention, tuple[str, ...]] = {}
        strange: Read | None = None
        for where, row in itertools.islice(self._rows(), _PEEK):
            found = None if isinstance(row, str) else recognise(row)
            if found is None:
                strange = strange or (where, row)
                continue
            votes[found] += 1
            seen.setdefault(found, tuple(row))
        if not votes:
            known = "; ".join(convention.name for convention in CONVENTIONS)
            if strange is None:
                raise ValueError(f"{self.source}: there are no rows; expected columns of one of these: {known}")
            where, row = strange
            if isinstance(row, str):
                raise ValueError(f"{self.source}, {where}: {row}")
            has = ", ".join(map(repr, row)) or "(none)"
            raise ValueError(f"{self.source}, {where}: the columns {has} are in no known convention: {known}")
        best = votes.most_common(1)[0][0]
        return best, seen[best]

    def __iter__(self) -> Iterator[Example]:
        self.rejected.count, self.rejected.rows = 0, []
        self.read = self.unwanted = 0
        self._divided: bool | None = None
        for where, row in self._rows():
            self.read += 1
            try:
                example = self._example(where, row)
            except BadExample as error:
                self.rejected.add(where, str(error))
                continue
            if example.label == 0 and self.kind == "demonstrations":
                self.unwanted += 1
            else:
                yield example

    def _example(self, where: str, row: dict[str, Any] | str) -> Example:
        if isinstance(row, str):
            raise BadExample(row)
        missing = [name for name in self.convention.columns if name not in row]
        if missing:
            has = ", ".join(map(repr, row)) or "nothing"
            raise BadExample(f"there is no {missing[0]!r} here, unlike in most rows; this one has {has}")
        check_letters(row)
        example = self.convention.read(row)
        if self.kind not in ASKED_FOR:
            example = as_kind(example, self.kind)
        split = self._split(row)
        columns = {name: self._cell(value) for name, value in row.items() if name not in _SPENT}
        return replace(example, where=where, split=split, columns=columns, source=str(self.source))

    def _split(self, row: Mapping[str, Any]) -> str:
        present = "split" in row
        if self._divided not in (None, present):
            raise BadExample(f"{'a' if present else 'no'} 'split' here, unlike before: all rows have one, or none")
        self._divided = present
        if not present:
            return ""
        if not isinstance(row["split"], str) or row["split"] not in SPLIT_NAMES:
            raise BadExample(f"'split' must be one of {', '.join(SPLIT_NAMES)}, not {short(row['split'])}")
        return SPLIT_NAMES[row["split"]]

    def _cell(self, value: Any) -> Any:
        """Parse a list of objects, which CSV files hold as JSON."""
        if self.format in ("CSV", "TSV") and value.startswith('[{"'):
            with suppress(ValueError):
                return parsed(value)
        return value


def check_letters(row: Mapping[str, Any]) -> None:
    """Raise BadExample for half a surrogate pair, which cannot be written to a file."""
    for name, value in row.items():
        try:
            json.dumps({name: value}, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise BadExample(f"{name!r} holds the lone surrogate {half!r}: correct the text") from None
