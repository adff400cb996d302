"""What the kernels' tests share: every implementation on every device it has, and comparison with float64."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from lm_envs.kernels.logprob_kl import LogprobKL, logprob_kl

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = not torch.cuda.is_available()

triton_on_cpu = pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="triton is not there, or there is a GPU")
triton_on_gpu = pytest.mark.skipif(not HAS_TRITON, reason="triton is not there")


def cases(*names: str) -> list:
    """(implementation, device) of those named, in this order; those on CUDA have the mark gpu."""
    found = []
    for name in names:
        if name == "triton":
            found.append(pytest.param(name, "cpu", marks=triton_on_cpu, id="triton-interpreted"))
            found.append(pytest.param(name, "cuda", marks=[pytest.mark.gpu, triton_on_gpu], id="triton-cuda"))
            continue
        found.append(pytest.param(name, "cpu", id=name))
        if name != "native":
            found.append(pytest.param(name, "cuda", marks=pytest.mark.gpu, id=f"{name}-cuda"))
    return found


def crossed(implementations: list, *others: Iterable[Any], quick: Callable[..., bool]) -> list:
    """Every case with every combination of the others. Triton's interpreter, which needs up to a second for each, has
    those that are not ``quick`` in the slow suite alone."""
    found = []
    for case in implementations:
        for values in itertools.product(*others):
            slow = case.values == ("triton", "cpu") and not quick(*values)
            marks = [*case.marks, pytest.mark.slow] if slow else case.marks
            found.append(pytest.param(*case.values, *values, marks=marks, id="-".join([case.id, *map(str, values)])))
    return found


EVERY = cases("torch", "chunked", "native", "triton")
FUSED = cases("chunked", "native", "triton")
FLOAT64 = cases("torch", "chunked", "triton")  # those that take it


def example(rows: int, vocabulary: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0, near: float = 1.0):
    """Policy and reference logits with their difference of scale ``near``, and ids; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    r = z + near * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, vocabulary, (rows,), generator=generator)
    return z.to(dtype).to(device), r.to(dtype).to(device), ids.to(device)


def with_gradient(z, r, ids, weights, implementation, **options) -> tuple[list, torch.Tensor]:
    """Results and the gradient in z of their sum weighted by ``weights (4, N)``."""
    z = z.detach().clone().requires_grad_()
    found = logprob_kl(z, r, ids, implementation=implementation, **options)
    terms = [(w * x.to(w.dtype)).sum() for w, x in zip(weights, found, strict=True) if x is not None]
    (gradient,) = torch.autograd.grad(sum(terms), z)
    return [x.detach() for x in found if x is not None], gradient


def definition(z, r, ids, weights, **options) -> tuple[list, torch.Tensor]:
    """The same in float64, by the definition, from the same (already rounded) logits."""
    r = None if r is None else r.double()
    return with_gradient(z.double(), r, ids, weights.double(), "torch", **options)


def assert_as_exact_as_plain_torch(z, r, ids, weights, implementation, epsilon, **options) -> None:
    """Error against float64 at most plain torch's own plus ``epsilon``, result by result."""
    exact, exact_gradient = definition(z, r, ids, weights, **options)
    plain, plain_gradient = with_gradient(z, r, ids, weights, "torch", **options)
    fused, gradient = with_gradient(z, r, ids, weights, implementation, **options)
    names = [name for name in LogprobKL._fields if r is not None or name in ("logprob", "entropy")]
    for name, a, b, c in zip(names, fused, plain, exact, strict=True):
        assert a.dtype == (torch.float64 if z.dtype == torch.float64 else torch.float32)
        worst, allowed = (a - c).abs().max(), (b - c).abs().max() + epsilon
        assert worst <= allowed, f"{name}: off by {worst}, allowed {allowed}"
    assert gradient.dtype == z.dtype
    worst, allowed = (gradient - exact_gradient).abs().max(), (plain_gradient - exact_gradient).abs().max() + epsilon
    if z.dtype == torch.bfloat16 and implementation == "triton" and INTERPRETED:
        allowed = exact_gradient.abs().max() * 2**-7  # the interpreter cuts digits off where a GPU rounds
    assert worst <= allowed, f"gradient: off by {worst}, allowed {allowed}"
