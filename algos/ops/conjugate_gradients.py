"""The solution of a linear system whose matrix is known by its products alone."""

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """Solve ``A x = b`` for a positive definite A, given ``product(v) = A v``, in at most ``steps`` products (Hestenes
    and Stiefel 1952); exact, up to rounding, after as many as b has entries."""
    x, residual = torch.zeros_like(b), b.clone()
    direction, square = residual.clone(), residual @ residual
    least = square * torch.finfo(b.dtype).eps ** 1.5
    for _ in range(steps):
        if square <= least:
            break
        along = product(direction)
        length = square / (direction @ along)
        x, residual = x + length * direction, residual - length * along
        before, square = square, residual @ residual
        direction = residual + square / before * direction
    return x
