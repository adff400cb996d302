"""What the kernels are compared with: every way to get the same numbers, each a function of the same inputs.

A variant returns ``(outputs, upstream gradients)``; what a peer does not compute is missing from its outputs, and its
name says what it gives. Needs torch; other libraries are used where they are installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lm_envs.kernels.linear_logprob_kl import linear_logprob_kl, linear_loss
from lm_envs.kernels.logprob_kl import logprob_kl, logprob_kl_reference

Outputs = tuple[list[Tensor], list[Tensor]]

NAMES = (
    "triton", "native", "chunked", "torch", "compile", "trl", "liger (logprob)",
    "chunks", "tiled", "loss", "linear torch", "liger linear (logprob)",
)  # fmt: skip


class Inputs(NamedTuple):
    """Logits, or hidden states and output matrices, of policy and reference."""

    z: Tensor
    r: Tensor | None
    ids: Tensor
    upstream: Tensor  # (4, N)
    hidden: Tensor | None = None
    weight: Tensor | None = None
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None

    @property
    def linear(self) -> tuple[Any, Any, Any, Any, Any]:
        """The first arguments of the linear form."""
        return self.hidden, self.weight, self.ref_hidden, self.ref_weight, self.ids


def inputs(size: Any, device: str) -> Inputs:
    """Random, of the kind a model gives: logits of standard deviation 3, the reference one apart."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, size.dtype)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(scale).to(dtype)

    n, v, h = size.rows, size.vocabulary, size.width
    ids = torch.randint(0, v, (n,), generator=generator, device=device)
    upstream = torch.randn(4, n, generator=generator, device=device)
    two = size.form == "dual"
    if h == 0:
        z = draw(n, v, scale=3.0)
        r = draw(n, v).add_(z) if two else None
        return Inputs(z.requires_grad_(), r, ids, upstream)
    hidden, weight = draw(n, h).requires_grad_(), draw(v, h, scale=3 * h**-0.5).requires_grad_()
    reference = (draw(n, h), draw(v, h, scale=3 * h**-0.5)) if two else (None, None)
    return Inputs(hidden, None, ids, upstream, hidden, weight, *reference)


def leaves(data: Inputs) -> list[Tensor]:
    """What gradients are taken in."""
    return [data.z] if data.hidden is None or data.weight is None else [data.hidden, data.weight]


def once(call: Callable[[Inputs], Outputs], data: Inputs) -> None:
    """Forward and backward."""
    value, upstream = call(data)
    torch.autograd.grad(value, leaves(data), upstream, allow_unused=True)


def available(size: Any, device: str, names: Sequence[str] | None) -> Iterator[tuple[str, Callable[[Inputs], Outputs]]]:
    """The variants that can run this here, by name; of ``names`` only, if given."""
    makers: dict[str, Callable[[], Callable[[Inputs], Outputs] | None]]
    if size.width == 0:
        ours = ("triton", "chunked") if device == "cuda" else ("native", "chunked")
        makers = {name: functools.partial(functools.partial, _ours, name) for name in ours}
        makers |= {"torch": lambda: _torch, "compile": _compiled, "trl": lambda: _trl(size)}
        makers |= {"liger (logprob)": lambda: _liger(size, device)}
    else:
        makers = {"chunks": lambda: functools.partial(_linear, "auto"), "loss": lambda: _loss}
        makers |= {"tiled": lambda: functools.partial(_linear, "tiled")} if device == "cuda" else {}
        makers |= {"linear torch": lambda: functools.partial(_linear, "torch")}
        makers |= {"liger linear (logprob)": lambda: _liger_linear(size, device)}
    for name, make in makers.items():
        call = make() if names is None or name in names else None
        if call is not None:
            yield name, call


def versions() -> dict[str, str]:
    """Of what is compared; empty where it is not installed."""
    found = dict.fromkeys(("triton", "liger-kernel", "trl"), "")
    for package in found:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _weighted(found: Sequence[Tensor | None], upstream: Tensor) -> Outputs:
    """Results with gradients, and theirs from above."""
    pairs = [(x, g) for x, g in zip(found, upstream, strict=True) if x is not None and x.requires_grad]
    return [x for x, _ in pairs], [g.to(x.dtype) for x, g in pairs]


def _ours(implementation: Any, data: Inputs) -> Outputs:
    return _weighted(logprob_kl(data.z, data.r, data.ids, implementation=implementation), data.upstream)


def _torch(data: Inputs) -> Outputs:
    return _weighted(logprob_kl_reference(data.z, data.r, data.ids), data.upstream)


def _compiled() -> Callable[[Inputs], Outputs]:
    reference = torch.compile(logprob_kl_reference, dynamic=False)
    return lambda data: _weighted(reference(data.z, data.r, data.ids), data.upstream)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _trl(size: Any) -> Callable[[Inputs], Outputs] | None:
    """TRL's helpers: a log-probability and an entropy; it has no KL over the vocabulary."""
    if not _installed("trl") or size.form == "dual":
        return None
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def call(data: Inputs) -> Outputs:
        logprob, entropy = selective_log_softmax(data.z, data.ids), entropy_from_logits(data.z)
        return _weighted([logprob, None, entropy, None], data.upstream)

    return call


def _liger(size: Any, device: str) -> Callable[[Inputs], Outputs] | None:
    """Liger's cross-entropy: the log-probability alone. It writes the gradient over the logits in its forward, so it
    is given a copy."""
    if not _installed("liger_kernel") or size.form == "dual" or device == "cpu":
        return None
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss(reduction="none")
    return lambda data: _weighted([-loss(data.z.clone(), data.ids), None, None, None], data.upstream)


def _linear(implementation: Any, data: Inputs) -> Outputs:
    return _weighted(linear_logprob_kl(*data.linear, implementation=implementation), data.upstream)


def _loss(data: Inputs) -> Outputs:
    """The same sum as a loss that is known beforehand."""

    def loss(found: Any, rows: Tensor) -> Tensor:
        return sum((g[rows] * x).sum() for g, x in zip(data.upstream, found, strict=True) if x is not None)

    value = linear_loss(*data.linear, loss)
    return [value], [torch.ones_like(value)]


def _liger_linear(size: Any, device: str) -> Callable[[Inputs], Outputs] | None:
    """Liger's linear cross-entropy: the log-probability alone, summed, since it knows no other gradient from above."""
    if not _installed("liger_kernel") or size.form == "dual" or device == "cpu":
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def call(data: Inputs) -> Outputs:
        value = loss(data.weight, data.hidden, data.ids)
        return [value], [torch.ones_like(value)]

    return call
