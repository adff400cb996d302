"""Labelled text of the user's own: reading it, dividing it, and cutting openings to write prompts from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_envs.jsonl import read_jsonl

SPLITS = ("train", "validation", "test")
_SPLIT_NAMES = {name: name for name in SPLITS} | {
    "training": "train",
    "dev": "validation",
    "val": "validation",
    "valid": "validation",
}
_HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class LabelledText:
    """One text.

    Attributes:
        text: with each run of white space as one space.
        label: 1 for what is wanted, 0 for the other.
        split: ``"train"``, ``"validation"`` or ``"test"``.
    """

    text: str
    label: int
    split: str


def share(text: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the text and the purpose alone: dividing by it needs no seed and no order."""
    digest = hashlib.sha256(f"{purpose}\0{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def read_labelled(path: str | Path) -> list[LabelledText]:
    """Read a JSONL file of rows with ``text``, ``label`` (0 or 1) and perhaps ``split``.

    A text that occurs again counts once, in the split that is furthest from training (test, then validation), so
    that nothing held out is trained on. Where the rows have no ``split``, a hash of each text deals 80, 10 and 10 %
    of them to training, validation and test; a split that the file lacks gets 10 % of the training texts the same
    way.

    Raises:
        ValueError: a malformed row (the message names file and line), or too little of something: training texts of
            either label, validation or test texts.
    """
    rows: list[LabelledText] = []
    with_split: bool | None = None
    for line, row in read_jsonl(path):
        where = f"{path}, line {line}"
        text, label = _text(row, where), _label(row, where)
        if with_split is None:
            with_split = "split" in row
        elif with_split != ("split" in row):
            raise ValueError(
                f"{where}: {'no' if with_split else 'a'} 'split' here, unlike in the rows before: all rows have one, or none"
            )
        rows.append(LabelledText(text, label, _split(row, where) if with_split else "train"))
    rows = _deal(_once(rows))
    _check(rows, path)
    return rows


def _found(row: Mapping[str, Any], name: str) -> str:
    return f"not {row[name]!r}" if name in row else "and there is none"


def _text(row: Mapping[str, Any], where: str) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        raise ValueError(f"{where}: 'text' must be a string, {_found(row, 'text')}")
    text = " ".join(text.split())
    if not text:
        raise ValueError(f"{where}: 'text' is empty")
    return text


def _label(row: Mapping[str, Any], where: str) -> int:
    label = row.get("label")
    if isinstance(label, float) or label not in (0, 1):  # True and False will do
        raise ValueError(f"{where}: 'label' must be 0 or 1, {_found(row, 'label')}")
    return int(label)


def _split(row: Mapping[str, Any], where: str) -> str:
    split = row["split"]
    if not isinstance(split, str) or split not in _SPLIT_NAMES:
        raise ValueError(f"{where}: 'split' must be one of {', '.join(_SPLIT_NAMES)}, not {split!r}")
    return _SPLIT_NAMES[split]


def _once(rows: Sequence[LabelledText]) -> list[LabelledText]:
    kept: dict[str, LabelledText] = {}
    for row in rows:
        if row.text not in kept or SPLITS.index(row.split) > SPLITS.index(kept[row.text].split):
            kept[row.text] = row
    return list(kept.values())


def _deal(rows: list[LabelledText]) -> list[LabelledText]:
    found = {row.split for row in rows}
    lacking = [name for name in ("validation", "test") if name not in found]

    def split(row: LabelledText) -> str:
        place = int(share(row.text, "split") / _HELD_OUT_SHARE)
        return lacking[place] if row.split == "train" and place < len(lacking) else row.split

    return [LabelledText(row.text, row.label, split(row)) for row in rows]


def _check(rows: Sequence[LabelledText], path: str | Path) -> None:
    for half in (0, 1):
        for label in (0, 1):
            count = sum(row.label == label for row in training_half(rows, half))
            if count < 2:
                raise ValueError(
                    f"{path}: of {len(rows)} different texts, {count} with label {label} fall to {_HALVES[half]}: "
                    "give more texts of either label (some thousands for a useful task)"
                )
    for name in ("validation", "test"):
        if not any(row.split == name for row in rows):
            raise ValueError(
                f"{path}: {len(rows)} different texts leave none for {name}: give more texts, or 'split's of your own"
            )


_HALVES = ("the reward model's half of the training texts", "the judge's half of the training texts")


def training_half(rows: Sequence[LabelledText], half: int) -> list[LabelledText]:
    """The training texts whose labels the reward model (half 0) or the judge (half 1) learns from."""
    return [row for row in rows if row.split == "train" and (share(row.text, "half") < 0.5) == (half == 0)]


def openings(rows: Sequence[LabelledText], words: int) -> dict[str, list[str]]:
    """The first ``words`` words of the texts that go on after them.

    Each opening occurs once and in one split only: test before validation before training.
    """
    found: dict[str, list[str]] = {}
    taken: set[str] = set()
    for name in reversed(SPLITS):
        texts = (row.text.split(" ") for row in rows if row.split == name)
        fresh = dict.fromkeys(" ".join(text[:words]) for text in texts if len(text) > words)
        found[name] = [opening for opening in fresh if opening not in taken]
        taken.update(fresh)
    return {name: found[name] for name in SPLITS}
