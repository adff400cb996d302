"""Labelled text of the user's own: reading it, dividing it, and cutting openings to write prompts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_envs.data.jsonl import read_jsonl
from lm_envs.data.splits import SPLITS, SplitColumn, divide, share


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


def read_labelled(path: str | Path) -> list[LabelledText]:
    """Read a JSONL file of rows with ``text``, ``label`` (0 or 1) and perhaps ``split``.

    A text that occurs again counts once, with its first label. Texts without ``split`` are divided by
    :func:`~lm_envs.data.splits.divide`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a malformed row (the message names file and line), or too few texts: each half of the training
            texts needs some of either label, validation and test one.
    """
    splits, found = SplitColumn(), []
    labels: dict[str, int] = {}
    for line, row in read_jsonl(path):
        where = f"{path}, line {line}"
        text = _text(row, where)
        labels.setdefault(text, _label(row, where))
        found.append((text, splits.read(row, where)))
    rows = [LabelledText(text, labels[text], split) for text, split in divide(found).items()]
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
                f"{path}: {len(rows)} different texts leave none for {name}: give more texts, or a 'split' of your own"
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
