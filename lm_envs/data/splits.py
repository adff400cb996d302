"""Dividing a user's rows into training, validation and test, the same way whatever their order."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {name: name for name in SPLITS} | {"training": "train", "dev": "validation", "val": "validation"}
"""What a split may be called, and which it is."""
_HELD_OUT_SHARE = 0.1
ENOUGH_PROMPTS = 100
"""Test prompts below which a task warns and a table says how few there were."""


def share(text: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the text and the purpose alone: dividing by it needs no seed and no order."""
    digest = hashlib.sha256(f"{purpose}\0{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def warn_if_few(source: object, prompts: Mapping[str, Sequence[object]]) -> None:
    """Warn where results will be the mean over too few test prompts; ``prompts`` by split."""
    count = len(prompts["test"])
    if count < ENOUGH_PROMPTS:
        sizes = ", ".join(f"{len(prompts[name])} {name}" for name in SPLITS)
        warnings.warn(
            f"{source}: {count} test prompt{'s' * (count != 1)} ({sizes}): too few to tell methods apart, whatever "
            "--test-prompts says; give more, or more of them the split 'test' (without a column 'split' a tenth "
            "is for testing)",
            stacklevel=3,
        )


def divide(found: Sequence[tuple[str, str]], source: object, note: str = "") -> dict[str, str]:
    """The split of each different text, each split of :data:`SPLITS` with at least one.

    A text that occurs in several splits belongs to the one furthest from training (test, then validation), so that
    nothing held out is trained on. A held-out split that no row has gets a tenth of the training texts, at least
    one, by their hashes.

    Args:
        found: texts with the split of their row, empty for training.
        source, note: before and behind the message of a ValueError, where a split is left without a text.
    """
    splits: dict[str, str] = {}
    for text, split in found:
        splits[text] = max(splits.get(text, "train"), split or "train", key=SPLITS.index)
    lacking = [name for name in SPLITS[1:] if name not in splits.values()]
    training = sorted((text for text in splits if splits[text] == "train"), key=lambda text: share(text, "split"))
    size = max(1, round(_HELD_OUT_SHARE * len(training)))
    for i, name in enumerate(lacking):
        splits.update(dict.fromkeys(training[i * size : (i + 1) * size], name))
    for name in SPLITS:
        if name not in splits.values():
            given = sorted({split for _, split in found} - {""})
            why = f"the column 'split' has {', '.join(given)}; leave it out to have them divided"
            why = why if given else "give more"
            raise ValueError(f"{source}: {len(splits)} different texts leave none for {name}: {why}{note}")
    return splits
