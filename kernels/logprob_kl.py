"""Vocabulary arithmetic of RLHF: sampled log-probability, entropy and exact KL from logits, forward and backward.

Policies, the reference and the losses on them take their softmax over the vocabulary here. ``logprob_kl_reference`` is
the definition; the fused implementations compute the same without ``(N, V)`` temporaries and write the gradient once.
docs/kernels.md derives both directions in the notation used here.
"""

import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Implementation = Literal["auto", "torch", "chunked", "native", "triton"]

# Up to this many logits plain torch is faster than the fixed cost of a fused call (measured, 1 thread).
SMALL = {"native": 2**14, "chunked": 2**18}


class LogprobKL(NamedTuple):
    """Per-position results, nats; ``ref_logprob`` and ``kl`` are None in the single-model form."""

    logprob: Tensor
    ref_logprob: Tensor | None
    entropy: Tensor
    kl: Tensor | None


class Options(NamedTuple):
    """What makes logits into log-probabilities, and how the KL is summed."""

    temperature: float = 1.0
    softcap: float | None = None
    precise: bool = False


class Rows(NamedTuple):
    """What a backend reads: logits ``(outer, inner, V)`` of both models, and ids and mask ``(outer * inner,)``."""

    z: Tensor
    r: Tensor | None
    ids: Tensor
    keep: Tensor | None
    options: Options


def scaled(logits: Tensor, temperature: float = 1.0, softcap: float | None = None) -> Tensor:
    """``c * tanh(logits / c) / temperature`` in float32 at least; -inf stays -inf under the softcap."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = (softcap * torch.tanh(logits / softcap)).masked_fill(logits == -math.inf, -math.inf)
    return logits if temperature == 1.0 else logits / temperature


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``log_softmax(logits / temperature)`` of ``(..., V)`` logits, float32 at least; -inf excludes a token.

    Raises:
        ValueError: a temperature that is not positive and finite.
    """
    check_numbers("log_softmax", temperature, None)
    return torch.log_softmax(scaled(logits, temperature), dim=-1)


def logprob_kl(
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    precise: bool = False,
    implementation: Implementation = "auto",
) -> LogprobKL:
    r"""Sampled log-probabilities, entropy and exact reverse KL of tokens, with gradients into the policy's logits.

    .. math::
        \log\pi(a) = x_a - \log\sum_v e^{x_v}, \quad
        H = -\sum_v p_v \log p_v, \quad
        KL(\pi\|q) = \sum_v p_v (\log p_v - \log q_v), \qquad x = z/T

    A token of probability zero contributes zero to ``H`` and ``KL``. Where the reference excludes a token that the
    policy does not, ``KL`` is +inf and has no gradient (NaN), unless its upstream gradient is 0. A row without any
    finite logit gives NaN. An implementation gives the same bits for the same input each time.

    Equivalent plain torch: :func:`logprob_kl_reference`.

    Args:
        logits: ``(..., V)`` of the policy, floating; -inf excludes a token.
        ref_logits: ``(..., V)`` of the reference, or None. A constant, unless it requires a gradient, which only
            "torch" and "chunked" give ("auto" chooses accordingly).
        ids: ``(...)`` integer, the sampled tokens, in [0, V). On CUDA this is not checked; an id outside gives NaN.
        temperature: divides both logits.
        softcap: c of ``c * tanh(logits / c)``, applied to both before the temperature.
        mask: ``(...)`` bool; results and gradients are 0 where it is False, whatever logits and ids hold there.
        precise: sum the KL as ``sum q - p + p * (log p - log q)``, whose terms are not negative and keep their digits
            when the two are close; costs a second pass forward. Without it the KL of float32 and bfloat16 logits is
            off by about 1e-6 and can be that much below 0.
        implementation: "torch" is :func:`logprob_kl_reference`; "chunked" works on a few rows at a time in reused
            buffers, on any device; "native" is C, compiled when first used, for float32 and bfloat16 on a CPU;
            "triton" is for CUDA; "auto" chooses by device, dtype and size.

    Returns:
        four tensors of the shape of ``ids``, float32 (float64 in, float64 out).

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit, or an implementation that cannot do it.
    """
    tensors = [("logits", logits), ("ref_logits", ref_logits), ("ids", ids), ("mask", mask)]
    _check_logits(logits, ref_logits, ids, tensors)
    options = Options(float(temperature), softcap, precise)
    ids = check_arguments("logprob_kl", logits.shape[-1], ids, mask, options, tensors)
    chosen = choose(implementation, logits, ref_logits, options)
    if chosen == "torch":
        return logprob_kl_reference(logits, ref_logits, ids, mask=mask, **options._asdict())
    z, r = _rows(logits), None if ref_logits is None else _rows(ref_logits)
    if r is not None and r.shape != z.shape:
        z, r = z.reshape(1, -1, z.shape[-1]), r.reshape(1, -1, r.shape[-1])
    keep = None if mask is None else mask.reshape(-1).contiguous()
    found = _Fused.apply(z, r, ids.reshape(-1).contiguous(), keep, options, backend(chosen))
    return each(found, lambda x: x.view(ids.shape))


def logprob_kl_reference(
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    precise: bool = False,
) -> LogprobKL:
    """The definition of :func:`logprob_kl` in plain torch; same arguments, results and meaning."""
    if mask is not None:  # before any arithmetic: NaN times zero is NaN
        logits, ids = logits.masked_fill(~mask.unsqueeze(-1), 0), ids.masked_fill(~mask, 0)
        ref_logits = None if ref_logits is None else ref_logits.masked_fill(~mask.unsqueeze(-1), 0)
    log_p = torch.log_softmax(scaled(logits, temperature, softcap), dim=-1)
    p = log_p.exp()
    possible = p > 0
    finite = log_p.masked_fill(~possible, 0.0)  # 0 * -inf would be NaN, in the gradient too
    entropy = -(p * finite).sum(-1)
    logprob = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    ref_logprob = kl = None
    if ref_logits is not None:
        log_q = torch.log_softmax(scaled(ref_logits, temperature, softcap), dim=-1)
        ref_logprob = log_q.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        u = finite - log_q.masked_fill(~possible, 0.0)
        if precise:  # exp(-u) - 1 + u is computed as such only where it would cancel
            near = torch.expm1(-u.clamp(-1, 1)) + u
            terms = torch.where((u.abs() < 1) & possible, p * near, log_q.exp() - p + p * u)
        else:
            terms = p * u
        kl = terms.sum(-1)
    found = LogprobKL(logprob, ref_logprob, entropy, kl)
    return found if mask is None else each(found, lambda x: x.masked_fill(~mask, 0))


def choose(implementation: str, logits: Tensor, ref_logits: Tensor | None, options: Options) -> str:
    """The implementation that "auto" stands for, or the one named if it can do this.

    Raises:
        ValueError: it cannot, or there is none of that name.
    """
    if implementation == "auto":
        order: tuple[str, ...] = ("triton", "chunked") if logits.device.type == "cuda" else ("native", "chunked")
        order = tuple(name for name in order if logits.device.type == "cuda" or logits.numel() > SMALL[name])
        return next((name for name in order if _unable(name, logits, ref_logits, options) is None), "torch")
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation must be one of {', '.join(get_args(Implementation))}, got {implementation!r}")
    reason = None if implementation == "torch" else _unable(implementation, logits, ref_logits, options)
    if reason is not None:
        given = describe(("logits", logits), ("ref_logits", ref_logits))
        raise ValueError(f'implementation "{implementation}" {reason}; got {given}. "auto" finds one that can')
    return implementation


def backend(name: str) -> Any:
    """The module of an implementation. Imported when first used, because triton is slow to import and may be absent."""
    return importlib.import_module(f"{__name__}_{name}")


def _unable(name: str, logits: Tensor, ref_logits: Tensor | None, options: Options) -> str | None:
    try:
        return backend(name).unable(logits, ref_logits, options)
    except ModuleNotFoundError as error:
        return f"needs {error.name}, which is not installed"


class _Fused(torch.autograd.Function):
    """Rows through a backend's two functions; what differs between backends is only how they loop."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, r: Tensor | None, ids: Tensor, keep: Tensor | None, options: Options, backend: Any
    ) -> tuple[Tensor | None, ...]:
        # (rows of the backend, N): the first four are the results, the others what its backward needs
        stats = backend.forward(Rows(z, r, ids, keep, options))
        ctx.save_for_backward(z, r, ids, keep, stats)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)  # an output that is not used costs nothing
        found = results(stats, r is not None)
        if found.ref_logprob is not None and not ctx.needs_input_grad[1]:
            ctx.mark_non_differentiable(found.ref_logprob)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        z, r, ids, keep, stats = ctx.saved_tensors
        coefficients, ref_coefficients = backward_coefficients(stats, upstream)
        dz = dr = None
        if ctx.needs_input_grad[0]:
            second = r if upstream[3] is not None else None  # only the KL needs the reference's logits again
            dz = ctx.backend.backward(Rows(z, second, ids, keep, ctx.options), stats, coefficients)
        if ctx.needs_input_grad[1]:
            dr = ctx.backend.backward_ref(Rows(z, r, ids, keep, ctx.options), stats, ref_coefficients)
        return dz, dr, None, None, None, None


def each(found: Iterable[Tensor | None], change: Callable[[Tensor], Tensor]) -> LogprobKL:
    """The results that are there, changed."""
    changed: list[Any] = [None if x is None else change(x) for x in found]
    return LogprobKL(*changed)


def results(stats: Tensor, two: bool) -> LogprobKL:
    """Copies of the first four rows of a backend's sums; of one model without what is of two."""
    logprob, ref_logprob, entropy, kl = (stats[i].clone() for i in range(4))
    return LogprobKL(logprob, ref_logprob if two else None, entropy, kl if two else None)


def backward_coefficients(stats: Tensor, upstream: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """Per row: ``(g, c0, c1, c2)`` of the gradient in z and ``(g, c_p, c_q)`` of that in r, from upstream gradients.

    ``T dz_v = [v = a] g - p_v (c0 + c1 l_v + c2 k_v)`` and ``T dr_v = [v = a] g + c_p p_v + c_q q_v``.
    """
    zero = torch.zeros_like(stats[0])
    g, g_ref, g_entropy, g_kl = (zero if x is None else x.to(stats.dtype) for x in upstream)
    # An infinite KL that nobody asks a gradient of must not spoil the rest.
    from_kl = torch.where(g_kl == 0, zero, g_kl * stats[3])
    coefficients = torch.stack([g, g + g_entropy * stats[2] + from_kl, g_entropy - g_kl, g_kl])
    return coefficients, torch.stack([g_ref, -g_kl, g_kl - g_ref])


def _rows(x: Tensor) -> Tensor:
    """``(outer, inner, V)``, a view wherever two strides can say it (every slice of a ``(B, T, V)`` tensor)."""
    vocabulary = x.shape[-1]
    if x.ndim == 3:
        return x
    try:
        return x.view(1, -1, vocabulary) if x.numel() else x.reshape(1, 0, vocabulary)
    except RuntimeError:
        return x.reshape(1, -1, vocabulary)


Named = list[tuple[str, Tensor | None]]


def describe(*tensors: tuple[str, Tensor | None]) -> str:
    """Shape, dtype and device of each, for an error message."""
    given = [(name, x, str(x.dtype).removeprefix("torch.")) for name, x in tensors if x is not None]
    return ", ".join(f"{name} {tuple(x.shape)} {dtype} on {x.device}" for name, x, dtype in given)


def check_numbers(what: str, temperature: float, softcap: float | None) -> None:
    """Raises ValueError unless both are positive and finite (or there is no softcap)."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"{what}: temperature must be positive and finite, got {temperature}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{what}: softcap must be positive and finite, or None, got {softcap}")


def check_arguments(
    what: str, vocabulary: int, ids: Tensor, mask: Tensor | None, options: Options, tensors: Named
) -> Tensor:
    """What both forms ask of their arguments; returns int64 ids, 0 where masked.

    Raises:
        ValueError: it describes the ``tensors``.
    """
    check_numbers(what, options.temperature, options.softcap)
    given = describe(*tensors)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{what}: ids must be integers; got {given}")
    if mask is not None and (mask.shape != ids.shape or mask.dtype != torch.bool):
        raise ValueError(f"{what}: mask must be bool and of the shape of ids; got {given}")
    if len({x.device for _, x in tensors if x is not None}) > 1:
        raise ValueError(f"{what}: all tensors must be on one device; got {given}")
    ids = ids.long()
    if mask is not None:
        ids = ids.masked_fill(~mask, 0)
    if ids.device.type == "cpu" and ids.numel():  # elsewhere to look would be to wait
        least, most = (int(x) for x in torch.aminmax(ids))
        if least < 0 or most >= vocabulary:
            found = f"found {least} to {most}; got {given}"
            raise ValueError(f"{what}: ids must be in [0, {vocabulary}) where the mask is True, {found}")
    return ids


def _check_logits(logits: Tensor, ref_logits: Tensor | None, ids: Tensor, tensors: Named) -> None:
    problem = None
    if logits.ndim < 1 or logits.shape[-1] < 1 or not logits.is_floating_point():
        problem = "logits must be floating and (..., V) with V >= 1"
    elif logits.shape[:-1] != ids.shape:
        problem = "logits and ids do not fit, expected (..., V) and (...)"
    elif ref_logits is not None and (ref_logits.shape != logits.shape or not ref_logits.is_floating_point()):
        problem = "logits and ref_logits differ, policy and reference need the same vocabulary"
    if problem is not None:
        raise ValueError(f"logprob_kl: {problem}; got {describe(*tensors)}")
