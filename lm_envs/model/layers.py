"""Changes to a model's layers: GELU in one operation, and gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.activations import AccurateGELUActivation, FastGELUActivation, NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

M = TypeVar("M", bound=nn.Module)


def fuse(model: M) -> M:
    """Let torch compute the model's GELUs (Hendrycks and Gimpel 2016, eq. 3), in place; return the model.

    GPT-2 and similar models spell the formula out and keep five copies of their widest layer for backward, so a PPO
    iteration takes 1.7 times the memory. Results are equal up to rounding.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (NewGELUActivation, FastGELUActivation, AccurateGELUActivation)):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model


def recomputable(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the layers that can be computed again."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


_ATTENTION = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in ("cudnn_attention", "efficient_attention", "flash_attention", "flash_attention_for_cpu")
}
_WIDEST = 8  # a product that is this many times as wide as its input is little work for what it holds
_PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1}  # position of their first factor


def _policy(_: object, operation: Any, *given: Any, **__: Any) -> CheckpointPolicy:
    """Keep attention and products that neither narrow nor widen much, as adapters do: most of a layer's time, less than
    half of its memory."""
    keep = operation in _ATTENTION
    if (place := _PRODUCTS.get(operation)) is not None:
        into, out = given[place + 1].shape
        keep = into <= out <= _WIDEST * into
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def checkpointing(model: PreTrainedModel, *, keep_products: bool = False) -> Iterator[None]:
    """Keep each layer's input in forwards, and with ``keep_products`` also attention and most matrix products.

    transformers does so for layers in train mode. Only the layers' own flag is set, not that of the modules inside, and
    the rates of layers that apply dropout by their flag (BART, OPT) are 0, so dropout stays off.
    """
    layers = recomputable(model)
    rates = [(layer, name, rate) for layer in layers for name, rate in vars(layer).items()]
    rates = [found for found in rates if "dropout" in found[1] and isinstance(found[2], float)]
    # transformers renames these two methods in version 6.
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
