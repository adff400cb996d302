"""Gradient checkpointing: forwards that keep little of each layer, and compute the rest again for backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def recomputable(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that can be computed again."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


# Operations whose outputs are kept: what costs most of a layer's time, and less than half of its memory.
_PRODUCTS = [
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
]


@contextmanager
def checkpointing(model: PreTrainedModel, *, keep_products: bool = False) -> Iterator[None]:
    """Forwards within keep each layer's input, and with ``keep_products`` its matrix products and attention too: then
    norms, activations and the like alone are computed again.

    transformers does that for layers in train mode: the layers themselves are put there and not what is inside them,
    so that dropout stays off; so does that which a layer applies by its own flag (BART, OPT).
    """
    layers = recomputable(model)
    rates = [(layer, name, rate) for layer in layers for name, rate in vars(layer).items()]
    rates = [found for found in rates if "dropout" in found[1] and isinstance(found[2], float)]
    # transformers renames these two methods on the way to its version 6.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    options: dict[str, Any] = {"use_reentrant": False}
    if keep_products:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _PRODUCTS)
    getattr(model, f"{kind}_checkpointing_enable")(options)
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
