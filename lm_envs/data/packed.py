"""Examples as token ids, and a folder of them that is written in a stream and read a few rows at a time.

.. code-block:: text

    <folder>/
        tokens.bin          int32, prompt and completion of row after row; each completion of an example is a row
        rows.bin            int64, seven numbers a row: see COLUMNS
        info.json           its origin and counts
        reference-*/        float32, a reference's log-probabilities of the completions; named after its weights
        manifest.json       sizes and hashes of the first three; its presence means that the folder is whole
"""

from __future__ import annotations

import copy
import json
import math
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm_envs.data.conventions import Example
from lm_envs.data.dataset import Rejected
from lm_envs.data.splits import SPLITS, share
from lm_envs.files import MANIFEST, damaged, replacing_folder, sha256, write_manifest
from lm_envs.model.chat import BadExample
from lm_envs.model.text import Codec
from lm_envs.model.tokens import encode_text
from lm_envs.processes import group
from lm_envs.settings import short
from lm_envs.trajectories import Trajectories, from_responses

COLUMNS = ("prompt", "response", "group", "rank", "split", "share", "weight")
"""Tokens of the prompt and of the completion, the number of the example, the completion's rank in it (0 the best), the
split by its column (-1 for none), a hash of the prompt's text, by which rows are divided, and the example's weight in a
loss, the bits of a float64."""


@dataclass(frozen=True)
class EncodedExample:
    """An example in token ids. Texts for a reward model are completions of an empty prompt."""

    example: Example
    prompt: list[int]
    completions: list[list[int]]
    weight: float = 1.0


def tokenise(
    examples: Iterable[Example],
    codec: Codec,
    rejected: Rejected,
    max_length: int | None = None,
    reward_eos: bool | None = None,
    weight: str | None = None,
) -> Iterator[EncodedExample]:
    """Encode a stream of examples as :meth:`~lm_envs.model.text.Codec.encode` does, in order.

    Args:
        rejected: receives examples that have no tokens, are too long, or are refused by the chat template.
        max_length: the most tokens of prompt and completion together.
        reward_eos: for a reward model, whether an EOS follows its texts (``append_eos`` of
            :func:`~lm_envs.model.tokens.encode_text`). Each completion is then prompt and completion in one text
            without special tokens, as the model reads it while a policy with the same tokenizer is trained.
        weight: the column of each row's weight in a loss.

    Raises:
        ValueError: a bad example, or messages without a chat template.
    """
    for example in examples:
        try:
            counts = 1.0 if weight is None else _weight(example, weight)
            prompt, rows = codec.encode(example.prompt, example.completions, max_length)
            if reward_eos is not None:
                texts = map("".join, zip(*codec.decode([prompt] * len(rows), rows), strict=True))
                rows = [encode_text(codec.tokenizer, text, True, append_eos=reward_eos) for text in texts]
                prompt = []
            lengths = [len(row) for row in [prompt + ids for ids in rows] or [prompt]]
            if max_length is not None and max(lengths) > max_length:
                raise BadExample(f"{max(lengths):,} tokens with the completion, more than the {max_length:,} that fit")
            if not min(lengths):
                raise BadExample("the tokenizer makes no tokens of it")
        except BadExample as error:
            rejected.add(example.where, str(error))
        else:
            yield EncodedExample(example, prompt, rows, counts)


def _weight(example: Example, column: str) -> float:
    value = example.columns.get(column)
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        found = -1.0
    if not 0 <= found < math.inf:
        raise BadExample(f"{column!r} must be a weight, a number that is not negative, and is {short(value)}")
    return found


def pack(
    encoded: Iterable[EncodedExample],
    folder: Path,
    info: Callable[[], Mapping[str, Any]],
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Write a stream of tokenized examples to a folder, which is empty or absent.

    Args:
        info: returns the JSON values of ``info.json``; called when the stream has ended.
        progress: called with the number of examples, every 20,000 of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "rows.bin", "wb") as index:
        for number, found in enumerate(encoded):
            example = found.example
            place = SPLITS.index(example.split) if example.split else -1
            part = int(share(example.key, "split") * 2**53)
            weight = int(np.float64(found.weight).view(np.int64))
            for i, ids in enumerate(found.completions):
                tokens.write(np.asarray([*found.prompt, *ids], dtype=np.int32).tobytes())
                rank = example.ranks[i] if example.ranks else int(example.label == 0)
                row = (len(found.prompt), len(ids), number, rank, place, part, weight)
                index.write(np.asarray(row, dtype=np.int64).tobytes())
            if (number + 1) % 20_000 == 0:
                progress(number + 1)
    text = json.dumps(dict(info()), indent=1, ensure_ascii=False) + "\n"
    (folder / "info.json").write_text(text, encoding="utf-8")
    write_manifest(folder, {})


def info_of(folder: Path) -> dict[str, Any] | None:
    """Return a folder's ``info.json``, None if the folder is incomplete or was changed."""
    return json.loads((folder / "info.json").read_text(encoding="utf-8")) if damaged(folder) is None else None


class PackedExamples:
    """A folder that :func:`pack` wrote, or some of its rows, read like :class:`~lm_envs.trajectories.Trajectories`:
    ``len``, ``select``, ``group``, ``rank``. Only the table and the rows' offsets are in memory.

    Args:
        folder: its path.
        preferences: completions have ranks; otherwise they are demonstrations.
        mismatched: add each prompt once more, after all rows, with the completion of a row half the file away, of rank
            -1 (for KTO).

    Attributes:
        table: ``(B, 7)`` int64, the :data:`COLUMNS`.
        group, rank: ``(B,)`` int64, None for demonstrations.
    """

    def __init__(self, folder: Path, preferences: bool = False, mismatched: bool = False) -> None:
        self.folder, self._preferences, self._mismatched = folder, preferences, mismatched
        table: NDArray[np.int64] = np.fromfile(folder / "rows.bin", dtype=np.int64).reshape(-1, len(COLUMNS))
        ends = table[:, :2].sum(axis=1).cumsum()
        self._tokens = open(folder / "tokens.bin", "rb", buffering=0)
        if os.fstat(self._tokens.fileno()).st_size != 4 * int(ends[-1] if len(ends) else 0):
            raise ValueError(f"{folder} is damaged: tokens.bin has not the size that rows.bin says; delete the folder")
        response = ends - table[:, 1]
        prompt = response - table[:, 0]
        if mismatched:
            other = (np.arange(len(table)) + len(table) // 2) % len(table)
            more = table.copy()
            more[:, COLUMNS.index("response")], more[:, COLUMNS.index("rank")] = table[other, 1], -1
            table, prompt = np.concatenate([table, more]), np.tile(prompt, 2)
            response = np.concatenate([response, response[other]])
        # (B, 3): where a row's prompt, its completion, and the completion's reference log-probabilities begin
        self._starts = np.stack([prompt, response, table[:, 1].cumsum() - table[:, 1]], axis=1)
        self._reference: Any = None
        self._show(table)

    def _show(self, table: NDArray[np.int64]) -> None:
        self.table = table
        self.group = torch.from_numpy(self.column("group")) if self._preferences else None
        self.rank = torch.from_numpy(self.column("rank")) if self._preferences else None

    def __len__(self) -> int:
        return len(self.table)

    def column(self, name: str) -> NDArray[np.int64]:
        """Return one of the :data:`COLUMNS`, ``(B,)`` int64."""
        return self.table[:, COLUMNS.index(name)].copy()

    def rows(self, index: NDArray[Any]) -> PackedExamples:
        """Return the rows of an index or of a ``(B,)`` bool mask, in that order."""
        part = copy.copy(self)
        part._starts = self._starts[index]
        part._show(self.table[index])
        return part

    def read(self, row: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the token ids of a row's prompt and of its completion."""
        # Read, not mapped: pages of a map would count as this process's memory.
        parts = (
            os.pread(self._tokens.fileno(), 4 * int(self.table[row, i]), 4 * int(self._starts[row, i])) for i in (0, 1)
        )
        prompt, response = (np.frombuffer(part, dtype=np.int32).astype(np.int64) for part in parts)
        return prompt, response

    def select(self, index: Tensor | slice) -> Trajectories:
        """Return the rows of ``index`` (int64 indices or a slice), in that order, without unneeded padding."""
        chosen = np.arange(len(self))[index if isinstance(index, slice) else index.numpy()]
        prompts, responses = zip(*(self.read(int(row)) for row in chosen), strict=True)
        traj = from_responses(prompts, responses, max(map(len, prompts)))
        if self.group is not None and self.rank is not None:
            traj.group, traj.rank = self.group[index], self.rank[index]
            traj.weight = torch.from_numpy(self.column("weight").view(np.float64)[chosen]).float()
        if self._reference is not None:
            traj.ref_logprob = torch.zeros(traj.mask.shape, dtype=torch.float32)
            for i, row in enumerate(chosen):
                held = os.pread(self._reference.fileno(), 4 * len(responses[i]), 4 * int(self._starts[row, 2]))
                traj.ref_logprob[i, : len(responses[i])] = torch.from_numpy(np.frombuffer(held, np.float32).copy())
        return traj

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that completions end in, the most frequent first."""
        places = 4 * (self._starts[:, 1] + self.table[:, 1] - 1)
        found = Counter(os.pread(self._tokens.fileno(), 4, int(place)) for place in places)
        return tuple(int(np.frombuffer(token, np.int32)[0]) for token, _ in found.most_common())

    @property
    def longest(self) -> tuple[int, int]:
        """The most tokens of a prompt and of a completion."""
        return int(self.table[:, 0].max()), int(self.table[:, 1].max())

    def divide(self, held_out: float) -> tuple[PackedExamples, PackedExamples]:
        """Return the rows to train on and those to hold out.

        With a column ``split``, validation and test are held out. Without one it is that share of the different
        prompts, at least one of two and never all, chosen by a hash of their text and so in any order of the rows.
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
        """Add ``ref_logprob`` to rows that are selected from now on, computed once per folder and stored in it.

        Args:
            key: a hash of the reference model.
            logprob: computes ``(B, T)`` log-probabilities under it, zero beyond the end; needed if none are stored.
            rows: rows per call of ``logprob``.

        Raises:
            ValueError: none are stored, and there is no ``logprob``.
        """
        folder = self.folder / f"reference-{key[:20]}"
        made_from = {"model": key, "rows": sha256(self.folder / MANIFEST), "mismatched": self._mismatched}
        if group.first(lambda: damaged(folder, made_from), "whether there is a reference") is not None:
            if logprob is None:
                raise ValueError(
                    f"{folder} is missing or damaged: it holds the reference's log-probabilities of the data"
                )
            whole = PackedExamples(self.folder, mismatched=self._mismatched)
            parts = (whole.select(slice(start, start + rows)) for start in range(0, len(whole), rows))
            found = (logprob(traj).float().cpu()[traj.mask].numpy().tobytes() for traj in parts)
            if group.rank() == 0:
                with replacing_folder(folder) as made, open(made / "logprob.bin", "wb") as file:
                    file.writelines(found)
                    file.flush()
                    write_manifest(made, made_from)
            else:  # helps to compute them
                deque(found, maxlen=0)
            group.exchange(None, "the reference on disk", patient=True)
        self._reference = open(folder / "logprob.bin", "rb", buffering=0)
