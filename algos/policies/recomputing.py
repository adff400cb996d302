"""Gradient checkpointing: forwards that keep each layer's input alone, and compute the layer again for backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def recomputable(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that can be computed again."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Forwards within keep each layer's input alone.

    transformers does that for layers in train mode: the layers themselves are put there and not what is inside them,
    so that dropout stays off; so does that which a layer applies by its own flag (BART, OPT).
    """
    layers = recomputable(model)
    rates = [(layer, name, rate) for layer in layers for name, rate in vars(layer).items()]
    rates = [found for found in rates if "dropout" in found[1] and isinstance(found[2], float)]
    # transformers renames these two methods on the way to its version 6.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    for layer, name, _ in rates:
        setattr(layer, name, 0.0)
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        for layer, name, rate in rates:
            setattr(layer, name, rate)
        getattr(model, f"{kind}_checkpointing_disable")()
