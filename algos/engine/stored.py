"""Demonstrations and preferences on disk as what agents learn from: batches are read when they are due."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm_envs.algos.engine.batching import Before
from lm_envs.data.packed import Packed
from lm_envs.files import replacing
from lm_envs.trajectories import Trajectories, from_responses


class StoredData:
    """Some rows of a :class:`~lm_envs.data.packed.Packed` folder, read like Trajectories: ``len``, ``select``,
    ``group``, ``rank``.

    Args:
        packed: the folder.
        rows: ``(B,)`` int64, numbers of the rows.
        preferences: rows have ranks; otherwise they are demonstrations.

    Attributes:
        group: ``(B,)`` int64, None of demonstrations.
        rank: ``(B,)`` int64, None of demonstrations.
    """

    def __init__(self, packed: Packed, rows: NDArray[np.int64], preferences: bool) -> None:
        self.packed, self.rows = packed, rows
        self.group = torch.from_numpy(packed.column("group")[rows]) if preferences else None
        self.rank = torch.from_numpy(packed.column("rank")[rows]) if preferences else None
        self._reference: Any = None
        self._starts: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, index: Tensor | slice) -> Trajectories:
        """The rows of ``index`` (int64 indices or a slice), in that order, with no more padding than they need."""
        chosen = self.rows[index if isinstance(index, slice) else index.numpy()]
        read = [self.packed.read(int(row)) for row in chosen]
        prompts, responses = [p for p, _ in read], [r for _, r in read]
        traj = from_responses(prompts, responses, max(map(len, prompts)))  # type: ignore[arg-type]
        if self.group is not None and self.rank is not None:
            traj.group, traj.rank = self.group[index], self.rank[index]
        if self._reference is not None:
            traj.ref_logprob = torch.zeros(traj.mask.shape, dtype=torch.float32)
            for i, row in enumerate(chosen):
                held = self._read_reference(int(row))
                traj.ref_logprob[i, : len(held)] = torch.from_numpy(held)
        return traj

    @property
    def longest(self) -> tuple[int, int]:
        """The most tokens of a prompt and of a response."""
        table = self.packed.rows[self.rows, :2]
        return int(table[:, 0].max()), int(table[:, 1].max())

    def keep_reference(self, policy: Any, rows: int) -> None:
        """Give what is selected from now on a ``ref_logprob``, the policy's as it is now.

        It is computed for all rows of the folder once, and kept in it as ``ref_logprob.bin``, float32.

        Args:
            rows: a forward.
        """
        response = self.packed.column("response")
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), response.cumsum()])
        path = self.packed.folder / "ref_logprob.bin"
        if not path.exists():
            self._write_reference(policy, rows, path)
        self._reference = open(path, "rb", buffering=0)

    def _write_reference(self, policy: Any, rows: int, path: Path) -> None:
        whole = StoredData(self.packed, np.arange(len(self.packed)), preferences=False)
        with replacing(path) as file:
            for start in range(0, len(whole), rows):
                traj = whole.select(slice(start, start + rows))
                logprob = Before(policy, traj.to(policy.model.device), rows).logprob.float().cpu()
                file.write(logprob[traj.mask].numpy().tobytes())

    def _read_reference(self, row: int) -> NDArray[np.float32]:
        assert self._starts is not None
        start, end = int(self._starts[row]), int(self._starts[row + 1])
        return np.frombuffer(os.pread(self._reference.fileno(), 4 * (end - start), 4 * start), dtype=np.float32).copy()
