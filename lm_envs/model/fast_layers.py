"""The same functions as a transformers model computes, faster: fewer operations, and the better library's products."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import AccurateGELUActivation, FastGELUActivation, NewGELUActivation
from transformers.pytorch_utils import Conv1D

M = TypeVar("M", bound=nn.Module)

_TANH_GELU = (NewGELUActivation, FastGELUActivation, AccurateGELUActivation)
_TWICE = 2 * math.sqrt(2 / math.pi)
WORTH = 2**20  # multiplications below which handing a product over costs more than it gains


def fuse(model: M) -> M:
    """:func:`fuse_activations` and :func:`fuse_linears`; changes ``model`` and returns it."""
    return fuse_linears(fuse_activations(model))


def fuse_activations(model: M) -> M:
    """Let torch compute the tanh form of GELU in one operation instead of eight; changes ``model`` and returns it.

    GPT-2 and similar models spell the formula out (Hendrycks and Gimpel 2016, eq. 3), which reads and writes the widest
    hidden layer eight times and keeps five copies of it for backward. The results are equal up to rounding; parameters,
    state dict and config stay as they are.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, _TANH_GELU):
                setattr(module, name, TanhGELU())
    return model


class TanhGELU(nn.GELU):
    """``nn.GELU(approximate="tanh")``; where no gradient is kept and on a CPU as ``x * sigmoid(2 u)``, which takes
    about half the time.

    With u = sqrt(2 / pi) (x + 0.044715 x^3) that is the same function, as tanh(u) = 2 sigmoid(2 u) - 1.
    """

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise, of any shape."""
        x, learns = input, torch.is_grad_enabled() and input.requires_grad
        if learns or x.dtype is not torch.float32 or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        gate = torch.addcmul(x.new_tensor(_TWICE), x, x, value=_TWICE * 0.044715)
        return gate.mul_(x).sigmoid_().mul_(x)


def fuse_linears(model: M) -> M:
    """Let oneDNN multiply the float32 matrices where torch would ask MKL and that is slower; changes ``model`` and
    returns it.

    That is on AMD processors with AVX-512, of which MKL uses half (:func:`onednn_is_faster`). The results are equal up
    to rounding; parameters, state dict and config stay as they are. Elsewhere nothing changes.
    """
    if onednn_is_faster():
        for module in model.modules():
            found = _FAST.get(type(module))
            if found is not None:
                module.__class__ = found  # the same parameters and hooks, another ``forward``
    return model


@cache
def onednn_is_faster() -> bool:
    """Whether float32 products on this processor are better done by oneDNN: a rule and no timing, so that a run's
    numbers do not depend on what else the machine did."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    about = torch.cpu.get_capabilities()
    if not (str(about.get("cpu_name", "")).startswith("AMD") and about.get("avx512_f", False)):
        return False
    x = torch.ones(1, 1)
    try:  # an operation that torch has for its own compiler, and makes no promise about
        return bool(_product(x, x, None) == 1)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` by oneDNN: ``(M, K)``, ``(N, K)``, ``(N,)`` to ``(M, N)``."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """:func:`_product` with its gradients by the same library."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.t(), None) if needs_x else None,
            _product(grad.t(), x.t(), None) if needs_weight else None,
            grad.sum(dim=0) if needs_bias else None,
        )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """``x (..., K)`` times ``weight (N, K)`` transposed, plus bias; None where it is better left to torch."""
    if (
        x.numel() * weight.shape[0] < WORTH
        or x.dtype is not torch.float32
        or weight.dtype is not torch.float32
        or x.device.type != "cpu"
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return None
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out = _Linear.apply(rows, weight, bias)
    else:
        out = _product(rows, weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


class FastLinear(nn.Linear):
    """:class:`torch.nn.Linear` by oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        """``(..., K)`` to ``(..., N)``."""
        out = _linear(input, self.weight, self.bias)
        return super().forward(input) if out is None else out


class FastConv1D(Conv1D):
    """GPT-2's linear layer, whose weight is ``(K, N)``, by oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        """``(..., K)`` to ``(..., N)``."""
        out = _linear(x, self.weight.t(), self.bias)
        return super().forward(x) if out is None else out


_FAST: dict[type, type] = {nn.Linear: FastLinear, Conv1D: FastConv1D}
