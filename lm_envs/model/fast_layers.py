"""The tanh form of GELU in one operation instead of eight."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from transformers.activations import AccurateGELUActivation, FastGELUActivation, NewGELUActivation

M = TypeVar("M", bound=nn.Module)


def fuse(model: M) -> M:
    """Let torch compute ``model``'s GELUs (Hendrycks and Gimpel 2016, eq. 3); changes it and returns it.

    GPT-2 and similar models spell the formula out and keep five copies of their widest hidden layer for backward:
    without this, a PPO iteration holds 1.7 times the memory. Results are equal up to rounding.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (NewGELUActivation, FastGELUActivation, AccurateGELUActivation)):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model
