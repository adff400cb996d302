"""Gradient checkpointing: forwards that keep little of each layer, and compute the rest again for backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def recomputable(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that can be computed again."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


_ATTENTION = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in ("cudnn_attention", "efficient_attention", "flash_attention", "flash_attention_for_cpu")
}
_PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1}  # where their first factor stands


def _policy(_: object, operation: Any, *given: Any, **__: Any) -> CheckpointPolicy:
    """Keep attention and the products that do not narrow: most of a layer's time, and less than half of its memory."""
    place = _PRODUCTS.get(operation)
    wide = place is not None and given[place].shape[1] <= given[place + 1].shape[1]
    return CheckpointPolicy.MUST_SAVE if wide or operation in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def checkpointing(model: PreTrainedModel, *, keep_products: bool = False) -> Iterator[None]:
    """Keep each layer's input in forwards, and with ``keep_products`` most matrix products and attention too.

    transformers does that for layers in train mode: the layers themselves are put there and not what is inside them, so
    that dropout stays off; so does that which a layer applies by its own flag (BART, OPT).
    """
    layers = recomputable(model)
    rates = [(layer, name, rate) for layer in layers for name, rate in vars(layer).items()]
    rates = [found for found in rates if "dropout" in found[1] and isinstance(found[2], float)]
    # transformers renames these two methods on the way to its version 6.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    options: dict[str, Any] = {"use_reentrant": False}
    if keep_products:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
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
