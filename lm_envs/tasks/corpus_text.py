"""Labelled text of the user's own: reading it, dividing it, and cutting openings to write prompts from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lm_envs.data.conventions import Example
from lm_envs.data.dataset import Examples
from lm_envs.data.splits import SPLITS, divide, share


def read_labelled(path: str | Path) -> list[Example]:
    """Read rows with ``text``, ``label`` (0 or 1) and perhaps ``split``, of any source; each run of white space becomes
    one space.

    A text that occurs again counts once, with its first label. Texts without ``split`` are divided by
    :func:`~lm_envs.data.splits.divide`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a malformed row (the message names file and line), or too few texts: each half of the training
            texts needs some of either label, validation and test one.
    """
    labels: dict[str, int] = {}
    found = []
    for example in Examples(path, "labelled"):
        text = " ".join(example.text.split())
        labels.setdefault(text, example.label)
        found.append((text, example.split))
    splits = divide(found, path)
    rows = [Example("", (text,), label=labels[text], split=split) for text, split in splits.items()]
    _check(rows, path)
    return rows


def _check(rows: Sequence[Example], path: str | Path) -> None:
    for half in (0, 1):
        for label in (0, 1):
            count = sum(row.label == label for row in training_half(rows, half))
            if count < 2:
                raise ValueError(
                    f"{path}: of {len(rows)} different texts, {count} with label {label} fall to {_HALVES[half]}: "
                    "give more texts of either label (some thousands for a useful task)"
                )


_HALVES = ("the reward model's half of the training texts", "the judge's half of the training texts")


def training_half(rows: Sequence[Example], half: int) -> list[Example]:
    """The training texts whose labels the reward model (half 0) or the judge (half 1) learns from."""
    return [row for row in rows if row.split == "train" and (share(row.text, "half") < 0.5) == (half == 0)]


def openings(rows: Sequence[Example], words: int) -> dict[str, list[str]]:
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
