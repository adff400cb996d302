"""Division of a user's rows into training, validation and test, independent of their order."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {name: name for name in SPLITS} | {"training": "train", "dev": "validation", "val": "validation"}
"""Accepted names of splits, and the split each means."""
_HELD_OUT_SHARE = 0.1
ENOUGH_PROMPTS = 100
"""With fewer test prompts a task warns, and a table names their number."""


def share(text: str, purpose: str) -> float:
    """Return a number in [0, 1) that depends on the text and the purpose alone, so no seed or order matters."""
    digest = hashlib.sha256(f"{purpose}\0{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def warn_if_few(source: object, prompts: Mapping[str, Sequence[object]]) -> None:
    """Warn if results will be the mean over too few test prompts; ``prompts`` by split."""
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
    """Return the split of each different text; each of :data:`SPLITS` gets at least one.

    A text in several splits belongs to the one furthest from training (test, then validation), so no held-out text is
    trained on. A held-out split without rows gets a tenth of the training texts, at least one, by their hashes.

    Args:
        found: texts with the split of their row, empty for training.
        source, note: begin and end the message of the ValueError if a split has no text.
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
