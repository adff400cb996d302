"""Dividing a user's rows into training, validation and test, the same way whatever their order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {name: name for name in SPLITS} | {"training": "train", "dev": "validation", "val": "validation"}
"""What a split may be called, and which it is."""
_HELD_OUT_SHARE = 0.1


def share(text: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the text and the purpose alone: dividing by it needs no seed and no order."""
    digest = hashlib.sha256(f"{purpose}\0{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class SplitColumn:
    """Reads the column ``split`` of row after row: all rows have one, or none."""

    def __init__(self) -> None:
        self._present: bool | None = None

    @property
    def present(self) -> bool:
        """Whether the rows so far have one."""
        return bool(self._present)

    def read(self, row: Mapping[str, Any], where: str) -> str:
        """The row's split, ``"train"`` where the rows have none.

        Raises:
            ValueError: an unknown split, or a row that is unlike those before; ``where`` is for the message.
        """
        present = "split" in row
        if self._present not in (None, present):
            raise ValueError(
                f"{where}: {'a' if present else 'no'} 'split' here, unlike before: all rows have one, or none"
            )
        self._present = present
        split = row.get("split", "train")
        if not isinstance(split, str) or split not in SPLIT_NAMES:
            raise ValueError(f"{where}: 'split' must be one of {', '.join(SPLIT_NAMES)}, not {split!r}")
        return SPLIT_NAMES[split]


def divide(found: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The split of each different text.

    A text that occurs in several splits belongs to the one furthest from training (test, then validation), so that
    nothing held out is trained on. A held-out split that no row has gets a tenth of the training texts, at least
    one, by their hashes.

    Args:
        found: texts with the split of their row.
    """
    splits: dict[str, str] = {}
    for text, split in found:
        splits[text] = max(splits.get(text, split), split, key=SPLITS.index)
    lacking = [name for name in SPLITS[1:] if name not in splits.values()]
    training = sorted((text for text in splits if splits[text] == "train"), key=lambda text: share(text, "split"))
    size = max(1, round(_HELD_OUT_SHARE * len(training)))
    for i, name in enumerate(lacking):
        splits.update(dict.fromkeys(training[i * size : (i + 1) * size], name))
    return splits
