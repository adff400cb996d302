"""Tokenized examples on disk: written in a stream and read a few at a time, so memory stays flat whatever the size.

.. code-block:: text

    <folder>/
        tokens.bin          int32, prompt and completion of row after row; each completion of an example is a row
        rows.bin            int64, six numbers a row: see COLUMNS
        info.json           what it was made from, and what was found
        reference-*/        float32, a reference's log-probabilities of the completions; named after its weights
        manifest.json       sizes and hashes of the first three; its presence means that the folder is whole
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm_envs.data.splits import SPLITS, share
from lm_envs.data.tokenizing import EncodedExample
from lm_envs.files import MANIFEST, damaged, replacing_folder, sha256, write_manifest
from lm_envs.trajectories import Trajectories, from_responses

COLUMNS = ("prompt", "response", "group", "rank", "split", "share")
"""Tokens of the prompt and of the completion, the number of the example, the completion's rank in it (0 the best), the
split by its column (-1 for none), and a number that depends on the prompt's text alone, by which rows are divided."""


def pack(
    encoded: Iterable[EncodedExample],
    folder: Path,
    info: Callable[[], Mapping[str, Any]],
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Write a folder, empty or absent, of a stream of tokenized examples.

    Args:
        info: what ``info.json`` says, in JSON's types; called when the stream has ended.
        progress: called with how many examples there are, every 20,000 of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "rows.bin", "wb") as index:
        for number, found in enumerate(encoded):
            example = found.example
            place = SPLITS.index(example.split) if example.split else -1
            part = int(share(example.key, "split") * 2**53)
            for i, ids in enumerate(found.completions):
                tokens.write(np.asarray([*found.prompt, *ids], dtype=np.int32).tobytes())
                rank = example.ranks[i] if example.ranks else 0
                row = (len(found.prompt), len(ids), number, rank, place, part)
                index.write(np.asarray(row, dtype=np.int64).tobytes())
            if (number + 1) % 20_000 == 0:
                progress(number + 1)
    known = dict(info())
    (folder / "info.json").write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_manifest(folder, {})


def info_of(folder: Path) -> dict[str, Any] | None:
    """A folder's ``info.json``; None where the folder is not whole, or no longer as it was written."""
    return json.loads((folder / "info.json").read_text(encoding="utf-8")) if damaged(folder) is None else None


class PackedExamples:
    """A folder that :func:`pack` wrote, or some of its rows, read like :class:`~lm_envs.trajectories.Trajectories`:
    ``len``, ``select``, ``group``, ``rank``.

    Args:
        folder: where it lies.
        preferences: completions have ranks; otherwise they are demonstrations.

    Attributes:
        table: ``(B, 6)`` int64, the :data:`COLUMNS`; with where rows begin, all that is kept in memory.
        group, rank: ``(B,)`` int64, None of demonstrations.
    """

    def __init__(self, folder: Path, preferences: bool = False) -> None:
        self.folder, self._preferences = folder, preferences
        table: NDArray[np.int64] = np.fromfile(folder / "rows.bin", dtype=np.int64).reshape(-1, len(COLUMNS))
        sizes = np.stack([table[:, :2].sum(axis=1), table[:, 1]], axis=1)
        self._starts = sizes.cumsum(axis=0) - sizes  # (B, 2), in tokens of rows and of completions
        self._tokens = open(folder / "tokens.bin", "rb", buffering=0)
        if os.fstat(self._tokens.fileno()).st_size != 4 * int(sizes[:, 0].sum()):
            raise ValueError(f"{folder} is damaged: tokens.bin has not the size that rows.bin says; delete the folder")
        self._reference: Any = None
        self._show(table)

    def _show(self, table: NDArray[np.int64]) -> None:
        self.table = table
        self.group = torch.from_numpy(self.column("group")) if self._preferences else None
        self.rank = torch.from_numpy(self.column("rank")) if self._preferences else None

    def __len__(self) -> int:
        return len(self.table)

    def column(self, name: str) -> NDArray[np.int64]:
        """``(B,)`` int64, one of the :data:`COLUMNS`."""
        return self.table[:, COLUMNS.index(name)].copy()

    def rows(self, index: NDArray[Any]) -> PackedExamples:
        """Some of the rows, in that order; by their numbers or by ``(B,)`` bool."""
        part = copy.copy(self)
        part._starts = self._starts[index]
        part._show(self.table[index])
        return part

    def read(self, row: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids of one row's prompt and of its completion."""
        prompt, response = map(int, self.table[row, :2])
        # Read, not mapped: pages of a map would count as this process's memory.
        data = os.pread(self._tokens.fileno(), 4 * (prompt + response), 4 * int(self._starts[row, 0]))
        ids = np.frombuffer(data, dtype=np.int32).astype(np.int64)
        return ids[:prompt], ids[prompt:]

    def select(self, index: Tensor | slice) -> Trajectories:
        """The rows of ``index`` (int64 indices or a slice), in that order, with no more padding than they need."""
        chosen = np.arange(len(self))[index if isinstance(index, slice) else index.numpy()]
        prompts, responses = zip(*(self.read(int(row)) for row in chosen), strict=True)
        traj = from_responses(prompts, responses, max(map(len, prompts)))
        if self.group is not None and self.rank is not None:
            traj.group, traj.rank = self.group[index], self.rank[index]
        if self._reference is not None:
            traj.ref_logprob = torch.zeros(traj.mask.shape, dtype=torch.float32)
            for i, row in enumerate(chosen):
                held = os.pread(self._reference.fileno(), 4 * len(responses[i]), 4 * int(self._starts[row, 1]))
                traj.ref_logprob[i, : len(responses[i])] = torch.from_numpy(np.frombuffer(held, np.float32).copy())
        return traj

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that completions end in, the most frequent first."""
        places = 4 * (self._starts[:, 0] + self.table[:, :2].sum(axis=1) - 1)
        found = Counter(os.pread(self._tokens.fileno(), 4, int(place)) for place in places)
        return tuple(int(np.frombuffer(token, np.int32)[0]) for token, _ in found.most_common())

    @property
    def longest(self) -> tuple[int, int]:
        """The most tokens of a prompt and of a completion."""
        return int(self.table[:, 0].max()), int(self.table[:, 1].max())

    def divide(self, held_out: float) -> tuple[PackedExamples, PackedExamples]:
        """The rows to train on and those to hold out.

        By the column ``split`` where there is one: validation and test are held out. Else that share of the different
        prompts, at least one if there are two and never all, by a hash of their text: the same in any
        order of the rows.
        """
        split, shares = self.column("split"), self.column("share")
        if (split >= 0).any():
            held = split > 0
            if twice := len(np.intersect1d(shares[held], shares[~held])):
                warnings.warn(
                    f"the column 'split' has {twice} prompt{'s' * (twice > 1)} in training and held-out rows alike: "
                    "held-out figures are not of unseen prompts",
                    stacklevel=2,
                )
        else:
            prompts = np.unique(shares)
            count = min(max(1, round(held_out * len(prompts))), len(prompts) - 1) if held_out > 0 else 0
            held = np.isin(shares, prompts[:count])
        return self.rows(~held), self.rows(held)

    def keep_reference(self, key: str, logprob: Callable[[Trajectories], Tensor] | None = None, rows: int = 1) -> None:
        """Give what is selected from now on a ``ref_logprob``, computed once for all rows of the folder and kept in it.

        Args:
            key: a hash of the reference model.
            logprob: ``(B, T)`` log-probabilities of rows under it, zero beyond the end; needed where they are not kept.
            rows: a call.

        Raises:
            ValueError: they are not kept, and there is no ``logprob``.
        """
        folder = self.folder / f"reference-{key[:20]}"
        made_from = {"model": key, "rows": sha256(self.folder / MANIFEST)}
        if damaged(folder, made_from) is not None:
            if logprob is None:
                raise ValueError(f"{folder} is missing or damaged: it holds what the reference says of the data")
            whole = PackedExamples(self.folder)
            with replacing_folder(folder) as made, open(made / "logprob.bin", "wb") as file:
                for start in range(0, len(whole), rows):
                    traj = whole.select(slice(start, start + rows))
                    file.write(logprob(traj).float().cpu()[traj.mask].numpy().tobytes())
                file.flush()
                write_manifest(made, made_from)
        self._reference = open(folder / "logprob.bin", "rb", buffering=0)
