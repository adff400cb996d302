"""The implementations that the kernel benchmark compares: functions that compute the same numbers from the same inputs.

A variant returns ``(outputs, upstream gradients)``; outputs that a peer does not compute are missing, and its name says
what it gives. Needs torch; other libraries are used where they are installed.
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


class Inputs(NamedTuple):
    """Logits of policy and reference, or the first arguments of the linear form: hidden states, matrices and ids."""

    z: Tensor
    r: Tensor | None
    ids: Tensor
    upstream: Tensor  # (4, N)
    linear: tuple[Any, ...] = ()


Call = Callable[[Inputs], Outputs]


def inputs(size: Any, device: str) -> Inputs:
    """Draw random inputs like a model's: logits of standard deviation 3, the reference's one apart."""
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
    return Inputs(hidden, None, ids, upstream, (hidden, weight, *reference, ids))


def leaves(data: Inputs) -> list[Tensor]:
    """Return the tensors that gradients are taken in."""
    return list(data.linear[:2]) or [data.z]


def once(call: Call, data: Inputs) -> None:
    """Run forward and backward."""
    value, upstream = call(data)
    torch.autograd.grad(value, leaves(data), upstream, allow_unused=True)


def available(size: Any, device: str, names: Sequence[str]) -> Iterator[tuple[str, Call]]:
    """Yield the variants that can run a size here, by name; only those of ``names``, if there are any."""
    for name, (linear, devices, make, package) in VARIANTS.items():
        missing = package and (size.form == "dual" or importlib.util.find_spec(package) is None)
        if linear == (size.width > 0) and device in devices and (not names or name in names) and not missing:
            yield name, make()


def versions() -> dict[str, str]:
    """Return the versions of the libraries that are compared, "" where one is not installed."""
    found = dict.fromkeys(("triton", "liger-kernel", "trl"), "")
    for package in found:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _weighted(found: Sequence[Tensor | None], upstream: Tensor) -> Outputs:
    """The results that have gradients, and the gradients from above."""
    pairs = [(x, g) for x, g in zip(found, upstream, strict=True) if x is not None and x.requires_grad]
    return [x for x, _ in pairs], [g.to(x.dtype) for x, g in pairs]


def _from_logits(function: Callable[..., Sequence[Tensor | None]], **options: Any) -> Call:
    return lambda data: _weighted(function(data.z, data.r, data.ids, **options), data.upstream)


def _from_hidden(implementation: Any) -> Call:
    return lambda data: _weighted(linear_logprob_kl(*data.linear, implementation=implementation), data.upstream)


def _trl() -> Call:
    """TRL's helpers: a log-probability and an entropy; it has no KL over the vocabulary."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return _from_logits(lambda z, r, ids: (selective_log_softmax(z, ids), None, entropy_from_logits(z), None))


def _liger() -> Call:
    """Liger's cross-entropy: the log-probability alone. Its forward overwrites the logits with their gradient, so it
    gets a copy."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss(reduction="none")
    return _from_logits(lambda z, r, ids: (-loss(z.clone(), ids), None, None, None))


def _loss(data: Inputs) -> Outputs:
    """The same sum as a loss that is known beforehand."""

    def loss(found: Any, rows: Tensor) -> Tensor:
        return sum((g[rows] * x).sum() for g, x in zip(data.upstream, found, strict=True) if x is not None)

    value = linear_loss(*(*data.linear, loss))
    return [value], [torch.ones_like(value)]


def _liger_linear() -> Call:
    """Liger's linear cross-entropy: the log-probability alone, summed, since it takes no other gradient from above."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def call(data: Inputs) -> Outputs:
        hidden, weight = leaves(data)
        value = loss(weight, hidden, data.ids)
        return [value], [torch.ones_like(value)]

    return call


_ANY = ("cpu", "cuda")
# By name: whether it takes hidden states (or logits), where it runs, what makes it, and the other library that it is
# from, which knows no second model.
VARIANTS: dict[str, tuple[bool, tuple[str, ...], Callable[[], Call], str]] = {
    "triton": (False, ("cuda",), lambda: _from_logits(logprob_kl, implementation="triton"), ""),
    "native": (False, ("cpu",), lambda: _from_logits(logprob_kl, implementation="native"), ""),
    "chunked": (False, _ANY, lambda: _from_logits(logprob_kl, implementation="chunked"), ""),
    "torch": (False, _ANY, lambda: _from_logits(logprob_kl_reference), ""),
    "compile": (False, _ANY, lambda: _from_logits(torch.compile(logprob_kl_reference, dynamic=False)), ""),
    "trl": (False, _ANY, _trl, "trl"),
    "liger (logprob)": (False, ("cuda",), _liger, "liger_kernel"),
    "chunks": (True, _ANY, functools.partial(_from_hidden, "auto"), ""),
    "tiled": (True, ("cuda",), functools.partial(_from_hidden, "tiled"), ""),
    "loss": (True, _ANY, lambda: _loss, ""),
    "linear torch": (True, _ANY, functools.partial(_from_hidden, "torch"), ""),
    "liger linear (logprob)": (True, ("cuda",), _liger_linear, "liger_kernel"),
}
