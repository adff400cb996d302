"""Shares of a batch's rows, the results of all shares put together again, and sums of gradients."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from lm_envs.processes import group

BUCKET = 2**24  # numbers of gradients that are sent at a time
Rows = NDArray[np.int64]


def shares(cost: ArrayLike, unit: ArrayLike | None = None) -> list[Rows]:
    """Deal rows out to the processes that share work, so that sums of costs are nearly equal.

    Args:
        cost: ``(B,)`` of each row, such as its tokens.
        unit: ``(B,)`` int64, rows with the same number stay together; None lets each row go by itself.

    Returns:
        for each process the ascending numbers of its rows; none for some if there are fewer units than processes.
    """
    cost = np.asarray(cost, dtype=np.float64)
    which = np.arange(len(cost)) if unit is None else np.unique(np.asarray(unit), return_inverse=True)[1]
    total = np.bincount(which, weights=cost)
    order = np.argsort(-total, kind="stable")
    turn = np.arange(len(order)) % (2 * group.world())  # there and back: 0 1 2 2 1 0 0 1 ...
    owner = np.empty_like(order)
    owner[order] = np.minimum(turn, 2 * group.world() - 1 - turn)
    return [np.flatnonzero(owner[which] == rank) for rank in range(group.world())]


def gather(
    rows: list[Rows], mine: Mapping[str, Tensor | None], step: str, fill: Mapping[str, float] | None = None
) -> dict[str, Tensor | None]:
    """Return the tensors of all rows from those of each process's share.

    Args:
        rows: the shares, as :func:`shares` deals them.
        mine: by name, of this process's rows in their order, the first axis; empty if it has none. Other axes may
            differ between processes; None stands for a tensor that there is not.
        fill: of the places that a wider process has; 0 for names that it lacks.
    """
    sent = {name: None if x is None else x.detach().cpu() for name, x in mine.items()}
    parts = [(index, part) for index, part in zip(rows, group.exchange(sent, step), strict=True) if len(index)]
    count = sum(map(len, rows))
    found: dict[str, Tensor | None] = {}
    for name in parts[0][1]:
        given = [(torch.from_numpy(index), x) for index, part in parts if (x := part[name]) is not None]
        if len(given) < len(parts):
            found[name] = None
            continue
        shape = [max(sizes) for sizes in zip(*(x.shape[1:] for _, x in given), strict=True)]
        whole = given[0][1].new_full((count, *shape), (fill or {}).get(name, 0))
        for index, x in given:
            place: tuple[Any, ...] = (index, *(slice(size) for size in x.shape[1:]))
            whole[place] = x
        found[name] = whole
    return found


def total(value: Any, step: str) -> Any:
    """The sum of the processes' numbers."""
    return sum(group.exchange(value, step))


def sum_gradients(parameters: Collection[nn.Parameter]) -> None:
    """Replace each gradient by its sum over processes; where only some have one, the others count as 0.

    Gradients of less precision than float32 are summed in float32.
    """
    if group.world() == 1:
        return
    known = group.exchange([p.grad is not None for p in parameters], "which gradients there are")
    held = [p for p, *have in zip(parameters, *known, strict=True) if any(have)]
    bucket: list[nn.Parameter] = []
    for place, p in enumerate(held):
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        bucket.append(p)
        follows = held[place + 1] if place + 1 < len(held) else None
        alike = follows is not None and follows.dtype == p.dtype and follows.device == p.device
        if not alike or sum(x.numel() for x in bucket) >= BUCKET:
            _sum([x.grad for x in bucket])  # type: ignore[misc]
            bucket = []


def _sum(gradients: list[Tensor]) -> None:
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    flat = torch.cat([gradient.reshape(-1).to(dtype) for gradient in gradients])
    group.add(flat, "the sum of gradients")
    for gradient, x in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(x.view_as(gradient))
