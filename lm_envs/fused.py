"""The same functions as a transformers model computes, by fewer operations."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from transformers.activations import AccurateGELUActivation, FastGELUActivation, NewGELUActivation

M = TypeVar("M", bound=nn.Module)

_TANH_GELU = (NewGELUActivation, FastGELUActivation, AccurateGELUActivation)


def fuse_activations(model: M) -> M:
    """Let torch compute the tanh form of GELU in one operation instead of eight; changes ``model`` and returns it.

    GPT-2 and its kin spell the formula out (Hendrycks and Gimpel 2016, eq. 3), which reads and writes the widest
    hidden layer eight times and keeps five copies of it for backward. The results are equal up to rounding; parameters,
    state dict and config stay as they are.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, _TANH_GELU):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model
