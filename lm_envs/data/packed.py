"""Tokenised data on disk: written in a stream and read a few rows at a time, so memory stays flat whatever the size.

.. code-block:: text

    <folder>/
        tokens.bin     int32, prompt and response of row after row
        rows.bin       int64, six numbers a row: see COLUMNS
        info.json      what it was made from, and what was found; its presence means that the folder is whole
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_envs.data.splits import SPLITS, share
from lm_envs.data.tokenizing import Encoded
from lm_envs.files import sync_file

COLUMNS = ("prompt", "response", "group", "rank", "split", "share")
"""Tokens of the prompt and of the response, the number of the example, the response's rank in it (0 the best), the
split by its column (-1 for none), and a number that depends on the prompt's text alone, by which rows are divided.
"""
_FLUSH = 1024  # rows


def pack(encoded: Iterable[Encoded], folder: Path, info: Callable[[], Mapping[str, Any]]) -> None:
    """Write a folder of tokenised examples.

    Args:
        encoded: a stream.
        folder: empty or absent.
        info: what ``info.json`` says, in JSON's types; called when the stream has ended.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[int, ...]] = []
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "rows.bin", "wb") as index:
        for number, found in enumerate(encoded):
            example, split = found.item.example, found.item.split
            place = -1 if split is None else SPLITS.index(split)
            part = int(share(example.key, "split") * 2**53)
            for i, ids in enumerate(found.completions):
                tokens.write(np.asarray([*found.prompt, *ids], dtype=np.int32).tobytes())
                rank = example.ranks[i] if example.ranks else 0
                rows.append((len(found.prompt), len(ids), number, rank, place, part))
            if len(rows) >= _FLUSH:
                index.write(np.asarray(rows, dtype=np.int64).tobytes())
                rows = []
        index.write(np.asarray(rows, dtype=np.int64).tobytes())
        for file in (tokens, index):
            sync_file(file)
    (folder / "info.json").write_text(json.dumps(dict(info()), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def info_of(folder: Path) -> dict[str, Any] | None:
    """A folder's ``info.json``; None where the folder is not whole."""
    try:
        found = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


class Packed:
    """A folder that :func:`pack` wrote.

    Attributes:
        rows: ``(N, 6)`` int64, the :data:`COLUMNS`; all that is kept in memory.
        folder: where it lies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: NDArray[np.int64] = np.fromfile(folder / "rows.bin", dtype=np.int64).reshape(-1, len(COLUMNS))
        ends = self.rows[:, :2].sum(axis=1).cumsum()
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), ends])
        self._tokens = open(folder / "tokens.bin", "rb", buffering=0)
        if os.fstat(self._tokens.fileno()).st_size != 4 * int(self._starts[-1]):
            raise ValueError(f"{folder} is damaged: tokens.bin has not the size that rows.bin says; delete the folder")

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> NDArray[np.int64]:
        """``(N,)`` int64, one of the :data:`COLUMNS`."""
        return self.rows[:, COLUMNS.index(name)]

    def read(self, row: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids of one row's prompt and of its response."""
        start, end = int(self._starts[row]), int(self._starts[row + 1])
        # Read, not mapped: pages of a map would count as this process's memory.
        data = os.pread(self._tokens.fileno(), 4 * (end - start), 4 * start)
        ids = np.frombuffer(data, dtype=np.int32).astype(np.int64)
        return ids[: self.rows[row, 0]], ids[self.rows[row, 0] :]

    def divide(self, held_out: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row numbers to train on and to hold out.

        By the column ``split`` where there is one: validation and test are held out. Else that share of the different
        prompts, at least one if there are two, by a hash of their text: the same whatever the order of the rows.
        """
        split = self.column("split")
        if (split >= 0).any():
            held = split > 0
        else:
            shares = self.column("share")
            prompts = np.unique(shares)
            count = max(1, round(held_out * len(prompts))) if held_out > 0 and len(prompts) > 1 else 0
            held = np.isin(shares, prompts[:count])
        return np.flatnonzero(~held), np.flatnonzero(held)
