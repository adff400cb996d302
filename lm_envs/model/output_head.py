"""The output layer of a language model as a matrix, so that log-probabilities need no logits of a whole batch.

The model's changes to its logits (a soft cap, a scale, a bias) are not looked up by family but measured in each
forward, from its logits for a head output of known numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lm_envs.kernels.linear_logprob_kl import Exclude, linear_logprob_kl, linear_loss
from lm_envs.kernels.logprob_kl import LogprobKL, scaled
from lm_envs.model.adapters import has_adapters

_LARGE = 2.0**14  # a logit of this size shows a scale exactly, and reaches a soft cap
Adapters = tuple[tuple[Tensor, float], ...]


@dataclass(frozen=True)
class OutputHead:
    """A linear head: ``logits = softcap * tanh(scale * z / softcap)``, or ``scale * z``, of ``z = inputs(hidden) @
    weight.T + bias``.

    Attributes:
        weight: ``(V, H)``; low-rank adapters' B beside the layer's own columns.
        bias: ``(V,)`` or None.
        adapters: their A ``(r, d)`` and scale, whose products with the hidden states are additional inputs.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    adapters: Adapters = ()

    def inputs(self, hidden: Tensor) -> Tensor:
        """Return ``(..., H)`` for hidden states ``(..., d)``."""
        more = [F.linear(hidden.to(a.dtype), a) * scale for a, scale in self.adapters]
        return torch.cat([x.to(self.weight.dtype) for x in (hidden, *more)], dim=-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return ``(..., V)``, at least float32, for hidden states ``(..., d)``."""
        softcap = None if self.softcap is None else self.softcap / self.scale
        return scaled(F.linear(self.inputs(hidden), self.weight, self.bias), 1 / self.scale, softcap)

    def logprob(
        self, hidden: Tensor, ids: Tensor, *, temperature: float, mask: Tensor | None, exclude: Exclude | None
    ) -> LogprobKL:
        """Call :func:`~lm_envs.kernels.linear_logprob_kl.linear_logprob_kl` for log-probability and entropy."""
        options = self._options(temperature, mask) | {"exclude": exclude}
        return linear_logprob_kl(self.inputs(hidden), self.weight, None, None, ids, **options)

    def nll(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the mean over the mask of ``-log p(id)``; its gradients are computed on the way."""
        options = self._options(1.0, mask)
        total = linear_loss(self.inputs(hidden), self.weight, None, None, ids, lambda p, _: -p.logprob.sum(), **options)
        return total / mask.sum()

    def _options(self, temperature: float, mask: Tensor | None) -> dict[str, Any]:
        softcap = None if self.softcap is None else self.softcap / self.scale
        return {"temperature": temperature / self.scale, "softcap": softcap, "mask": mask, "bias": self.bias}


def hidden_and_head(model: PreTrainedModel, given: dict[str, Any]) -> tuple[Tensor, OutputHead] | None:
    """Call the model without computing logits; return its last hidden states ``(B, L, d)`` and its head, None if the
    head is not understood."""
    module: nn.Module = model.get_output_embeddings()
    parts = _linear(module, has_adapters(model))
    if parts is None:
        return None
    weight, bias, adapters = parts
    wide = torch.promote_types(weight.dtype, torch.float32)
    probe = torch.zeros(1, 4, len(weight), dtype=wide, device=weight.device)
    probe[0, 1], probe[0, 2], probe[0, 3] = 1, torch.linspace(-4, 4, len(weight)), _LARGE
    seen: list[Tensor] = []

    def shorten(_: object, given: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(given[0])
        return (given[0][:1, :1], *given[1:])

    hooks = [module.register_forward_pre_hook(shorten), module.register_forward_hook(lambda *_: probe.clone())]
    try:
        logits = model(**given).logits
    finally:
        for hook in hooks:
            hook.remove()
    curve = _curve(probe, logits) if len(seen) == 1 and logits.shape == probe.shape else None
    if curve is None:
        return None
    scale, softcap, shift = curve
    kind = model.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    if shift is not None:
        bias = shift / scale if bias is None else bias + shift / scale
    return seen[0], OutputHead(weight.to(dtype), None if bias is None else bias.to(dtype), scale, softcap, adapters)


def _linear(module: nn.Module, adapted: bool) -> tuple[Tensor, Tensor | None, Adapters] | None:
    """Return weight, bias and adapters of a linear layer; None for any other, or one with foreign hooks."""
    if adapted:
        from peft.tuners.lora.layer import Linear as LoraLinear
        from peft.utils.other import ModulesToSaveWrapper

        if isinstance(module, ModulesToSaveWrapper):
            off = module.disable_adapters
            return _linear(module.original_module if off else module.modules_to_save[module.active_adapters[0]], False)
        if isinstance(module, LoraLinear):
            base = _linear(module.base_layer, False)
            names = [] if module.disable_adapters or module.merged else module.active_adapters
            names = [name for name in names if name in module.lora_A]
            up = [module.lora_B[name] for name in names]
            variants = any(name in module.lora_variant for name in names)
            if base is None or variants or any(b.bias is not None for b in up):
                return None
            weight = torch.cat([base[0], *(b.weight.to(base[0].dtype) for b in up)], dim=1) if up else base[0]
            return weight, base[1], tuple((module.lora_A[name].weight, module.scaling[name]) for name in names)
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    if not plain or "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return None
    return module.weight, module.bias, ()  # type: ignore[return-value]


def _curve(probe: Tensor, found: Tensor) -> tuple[float, float | None, Tensor | None] | None:
    """Return the scale, soft cap and shift ``(V,)`` that turn ``probe`` into ``found``; None if none do."""
    if torch.finfo(found.dtype).eps > torch.finfo(torch.float32).eps:
        return None
    shift = found[0, 0]
    moved = found - torch.where(shift.isfinite(), shift, 0.0)
    column = int(shift.isfinite().int().argmax())
    one, most = float(moved[0, 1, column]), float(moved[0, 3, column])
    shifted = bool((shift != 0).any())

    def fits(of: Callable[[Tensor], Tensor]) -> bool:
        near = 16 * torch.finfo(found.dtype).eps
        expected = of(probe.to(found.dtype)) + shift
        return torch.allclose(found, expected, rtol=near, atol=near * max(1.0, float(shift[column].abs())))

    scale = most / _LARGE
    if 0 < scale < math.inf and fits(lambda x: x * scale):
        return scale, None, shift if shifted else None
    if not 0 < one < most < math.inf or shifted:
        return None
    scale = most * math.atanh(one / most)
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    return (scale, most, None) if fits(lambda x: most * torch.tanh(x * (scale / most))) else None
