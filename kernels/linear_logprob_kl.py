"""logprob_kl from hidden states and an output matrix: the ``(N, V)`` logits never exist, forward or backward.

Rows are taken a chunk at a time; a chunk's logits are one matrix product into a buffer that is used again, and what
:mod:`lm_envs.kernels.logprob_kl` does with logits is done to the buffer. With g = 2*N*V*H operations a matrix product
of all rows costs, forward is g a head. Upstream gradients are known only later, so backward computes logits again (g
for the policy's, g for the reference's if the KL has a gradient) before the 2g that the gradients themselves take.
:func:`linear_loss` is told the loss beforehand, takes gradients while a chunk's logits are there, and saves that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lm_envs.kernels.logprob_kl import (
    LogprobKL,
    Options,
    backend,
    backward_coefficients,
    check_arguments,
    choose,
    describe,
    logprob_kl_reference,
)

LinearImplementation = Literal["auto", "torch", "chunks", "tiled"]

# Logits of a chunk: enough rows for an efficient product, few enough to stay far below N * V.
CHUNK = {"cpu": 2**24, "cuda": 2**27}


def linear_logprob_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    precise: bool = False,
    implementation: LinearImplementation = "auto",
    chunk_rows: int | None = None,
) -> LogprobKL:
    """What ``logprob_kl(hidden @ weight.T, ref_hidden @ ref_weight.T, ids, ...)`` gives, without the logits.

    Differentiable in ``hidden`` and ``weight``; the reference is a constant. Memory beyond inputs and gradients: a
    chunk's logits (two of them with a reference), and for weights in low precision their gradient in float32. Masked
    rows cost nothing. Logits are rounded to the dtype of ``hidden``, as those of a model are.

    Args:
        hidden: ``(..., H)`` floating, the policy's last hidden states.
        weight: ``(V, H)`` of its output layer, same dtype; a bias can be a column beside a hidden state of 1.
        ref_hidden, ref_weight: ``(..., H')`` and ``(V, H')`` of the reference, both or neither.
        ids, temperature, softcap, mask, precise: as in :func:`lm_envs.kernels.logprob_kl.logprob_kl`.
        implementation: "torch" makes the logits; "chunks" is described above; "tiled" computes tiles of logits on the
            chip going forward (Triton) and is "chunks" going backward; "auto" is "chunks".
        chunk_rows: rows of a chunk; from the device and V if None.

    Returns:
        four tensors of the shape of ``ids``, float32 (float64 in, float64 out).

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit.
    """
    ids = _check(hidden, weight, ref_hidden, ref_weight, ids, mask, temperature, softcap, chunk_rows)
    if implementation not in get_args(LinearImplementation):
        names = ", ".join(get_args(LinearImplementation))
        raise ValueError(f"implementation must be one of {names}, got {implementation!r}")
    options = Options(float(temperature), softcap, precise)
    if implementation == "torch":
        if mask is not None:  # NaN in a masked row would reach the weight's gradient as 0 * NaN
            hidden = torch.where(mask[..., None], hidden, torch.zeros_like(hidden))
        logits = hidden @ weight.t()
        ref_logits = None if ref_hidden is None or ref_weight is None else (ref_hidden @ ref_weight.t()).detach()
        return logprob_kl_reference(logits, ref_logits, ids, mask=mask, **options._asdict())
    rows = _Rows.of(hidden, ref_hidden, ids, mask)
    job = _Job(options, implementation == "tiled", _chunk_rows(chunk_rows, weight, len(rows.ids)))
    found = _Linear.apply(rows.hidden, weight, rows.ref_hidden, _detached(ref_weight), rows.ids, job)
    shaped: list[Any] = [None if x is None else rows.spread(x, ids.shape) for x in found]
    return LogprobKL(*shaped)


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ids: Tensor,
    loss: Callable[[LogprobKL, Tensor], Tensor],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    precise: bool = False,
    chunk_rows: int | None = None,
) -> Tensor:
    """The sum of a loss over rows, its gradients taken while the logits of a chunk are there: nothing is recomputed.

    Equal to ``loss(linear_logprob_kl(...), rows)`` over all rows at once, for 4g instead of 6g (3g instead of 4g
    without a reference). For PPO, say: ``lambda found, rows: ppo_clip_loss(found.logprob, old[rows], ...).sum() / n``.

    Args:
        loss: from the results of a chunk, each ``(R,)``, and which rows of the flattened ``ids`` they are, ``(R,)``
            int64, to a scalar that adds up over chunks. What else it depends on gets no gradient.

    Other arguments, and errors raised, as for :func:`linear_logprob_kl`.

    Returns:
        a scalar, differentiable in ``hidden`` and ``weight``.
    """
    ids = _check(hidden, weight, ref_hidden, ref_weight, ids, mask, temperature, softcap, chunk_rows)
    rows = _Rows.of(hidden, ref_hidden, ids, mask)
    job = _Job(Options(float(temperature), softcap, precise), False, _chunk_rows(chunk_rows, weight, len(rows.ids)))
    return _Loss.apply(rows.hidden, weight, rows.ref_hidden, _detached(ref_weight), rows.ids, job, loss, rows.source)


class _Job(NamedTuple):
    options: Options
    tiled: bool
    chunk_rows: int


@dataclass
class _Rows:
    """The rows that count, flattened; ``source`` says where they are from."""

    hidden: Tensor
    ref_hidden: Tensor | None
    ids: Tensor
    source: Tensor

    @staticmethod
    def of(hidden: Tensor, ref_hidden: Tensor | None, ids: Tensor, mask: Tensor | None) -> _Rows:
        count, ids = ids.numel(), ids.reshape(-1)
        hidden = hidden.reshape(count, hidden.shape[-1])
        ref_hidden = None if ref_hidden is None else ref_hidden.detach().reshape(count, ref_hidden.shape[-1])
        if mask is None:
            return _Rows(hidden, ref_hidden, ids, torch.arange(ids.numel(), device=ids.device))
        index = mask.reshape(-1).nonzero().squeeze(1)
        return _Rows(hidden[index], None if ref_hidden is None else ref_hidden[index], ids[index], index)

    def spread(self, x: Tensor, shape: torch.Size) -> Tensor:
        if self.source.numel() == shape.numel():
            return x.view(shape)
        return x.new_zeros(shape.numel()).index_copy(0, self.source, x).view(shape)


class _Chunks:
    """Logits of a chunk of rows in buffers that are used again, and the gradients that come from them."""

    def __init__(self, hidden: Tensor, weight: Tensor, ref_hidden: Any, ref_weight: Any, ids: Tensor, job: _Job):
        self.hidden, self.weight, self.ref_hidden, self.ref_weight = hidden, weight, ref_hidden, ref_weight
        self.ids, self.options = ids, job.options
        self._size = job.chunk_rows
        shape = (1, min(job.chunk_rows, len(ids)), weight.shape[0])
        self._z = torch.empty(shape, dtype=hidden.dtype, device=hidden.device)
        self._r = None if ref_hidden is None else torch.empty(shape, dtype=ref_hidden.dtype, device=hidden.device)
        with torch.no_grad():
            chosen = "triton" if job.tiled else choose("auto", self._z, self._r, job.options)
        self.backend = backend("chunked" if chosen == "torch" else chosen)
        # Triton's tuning runs a kernel several times, so it must not write over what it reads.
        self._dz = torch.empty_like(self._z) if chosen == "triton" else self._z
        self._partial: Tensor | None = None

    def __iter__(self) -> Iterator[slice]:
        return (slice(begin, begin + self._size) for begin in range(0, len(self.ids), self._size))

    def logits(self, rows: slice) -> Tensor:
        """The policy's, ``(1, R, V)``."""
        return _product(self.hidden[rows], self.weight.t(), self._z)

    def ref_logits(self, rows: slice) -> Tensor | None:
        """The reference's, ``(1, R, V)``."""
        return None if self._r is None else _product(self.ref_hidden[rows], self.ref_weight.t(), self._r)

    def forward(self, z: Tensor, r: Tensor | None, rows: slice) -> Tensor:
        """The backend's sums of the chunk."""
        return self.backend.forward(z, r, self.ids[rows], None, self.options)

    def backward(
        self, z: Tensor, r: Any, rows: slice, stats: Tensor, coefficients: Tensor, dh: Tensor | None, dw: Tensor | None
    ) -> None:
        """Write the chunk's rows of ``dh`` and add its share to ``dw``. Overwrites ``z``."""
        out = self._dz[:, : z.shape[1]]
        dz = self.backend.backward(z, r, self.ids[rows], None, stats, coefficients, self.options, out=out)[0]
        if dh is not None:
            torch.mm(dz, self.weight, out=dh[rows])
        if dw is None:
            return
        if dw.dtype == dz.dtype:
            dw.addmm_(dz.t(), self.hidden[rows])
        else:  # chunks add up in float32
            self._partial = torch.mm(dz.t(), self.hidden[rows], out=self._partial)
            dw.add_(self._partial)

    def gradients(self, needed: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        """Room for the gradients in hidden and weight, where they are asked for."""
        dh = torch.empty_like(self.hidden, memory_format=torch.contiguous_format) if needed[0] else None
        exact = self.weight.dtype if self.weight.dtype == torch.float64 else torch.float32
        return dh, torch.zeros_like(self.weight, dtype=exact) if needed[1] else None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ref_hidden: Any, ref_weight: Any, ids: Tensor, job: _Job):  # type: ignore[no-untyped-def]
        if job.tiled:
            stats = backend("triton_linear").forward(hidden, weight, ref_hidden, ref_weight, ids, job.options)
        else:
            chunks = _Chunks(hidden, weight, ref_hidden, ref_weight, ids, job)
            parts = [chunks.forward(chunks.logits(rows), chunks.ref_logits(rows), rows) for rows in chunks]
            wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
            stats = torch.cat(parts, dim=1) if parts else torch.zeros(9, 0, dtype=wide, device=ids.device)
        ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight, ids, stats)
        ctx.job = job
        ctx.set_materialize_grads(False)
        logprob, ref_logprob, entropy, kl = (stats[i].clone() for i in range(4))
        if ref_hidden is None:
            return logprob, None, entropy, None
        ctx.mark_non_differentiable(ref_logprob)
        return logprob, ref_logprob, entropy, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, ref_hidden, ref_weight, ids, stats = ctx.saved_tensors
        if upstream[3] is None:  # only the KL needs the reference's logits again
            ref_hidden = ref_weight = None
        chunks = _Chunks(hidden, weight, ref_hidden, ref_weight, ids, ctx.job)
        coefficients, _ = backward_coefficients(stats, upstream)
        dh, dw = chunks.gradients(ctx.needs_input_grad[:2])
        for rows in chunks:
            z, r = chunks.logits(rows), chunks.ref_logits(rows)
            chunks.backward(z, r, rows, stats[:, rows].contiguous(), coefficients[:, rows], dh, dw)
        return dh, None if dw is None else dw.to(weight.dtype), None, None, None, None


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, hidden: Tensor, weight: Tensor, ref_hidden: Any, ref_weight: Any, ids: Tensor, job: _Job,
        loss: Callable[[LogprobKL, Tensor], Tensor], index: Tensor,
    ):  # fmt: skip
        chunks = _Chunks(hidden, weight, ref_hidden, ref_weight, ids, job)
        needed = ctx.needs_input_grad[:2]
        dh, dw = chunks.gradients(needed)
        total = torch.zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32).to(ids.device)
        for rows in chunks:
            z, r = chunks.logits(rows), chunks.ref_logits(rows)
            stats = chunks.forward(z, r, rows)
            logprob, ref_logprob, entropy, kl = (stats[i].clone() for i in range(4))
            inputs = [logprob, entropy] if r is None else [logprob, entropy, kl]
            with torch.set_grad_enabled(any(needed)):
                for x in inputs if any(needed) else []:
                    x.requires_grad_()
                pair = (None, None) if r is None else (ref_logprob, kl)
                value = loss(LogprobKL(logprob, pair[0], entropy, pair[1]), index[rows])
                if value.shape != ():
                    raise ValueError(f"linear_loss: loss must return a scalar, got {describe(('value', value))}")
                total += value.detach()
            if not any(needed) or not value.requires_grad:
                if dh is not None:
                    dh[rows] = 0
                continue
            grads = (*torch.autograd.grad(value, inputs, allow_unused=True), None)
            coefficients, _ = backward_coefficients(stats, (grads[0], None, grads[1], grads[2]))
            chunks.backward(z, r if grads[2] is not None else None, rows, stats, coefficients, dh, dw)
        ctx.save_for_backward(dh, None if dw is None else dw.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if x is None else x * upstream.to(x.dtype) for x in ctx.saved_tensors), *[None] * 6


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    out = out[:, : len(a)]
    torch.mm(a, b, out=out[0])
    return out


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _chunk_rows(chosen: int | None, weight: Tensor, rows: int) -> int:
    return chosen or min(max(rows, 1), max(16, CHUNK.get(weight.device.type, CHUNK["cpu"]) // weight.shape[0]))


def _check(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    chunk_rows: int | None,
) -> Tensor:
    """Raises ValueError unless it all fits; ids, int64, 0 where masked."""
    tensors = [("hidden", hidden), ("weight", weight), ("ref_hidden", ref_hidden), ("ref_weight", ref_weight)]
    tensors += [("ids", ids), ("mask", mask)]
    given = describe(*tensors)
    what = "linear_logprob_kl"
    if (ref_hidden is None) != (ref_weight is None):
        raise ValueError(f"{what}: ref_hidden and ref_weight go together; got {given}")
    for name, h, w in (("", hidden, weight), ("ref_", ref_hidden, ref_weight)):
        if h is None or w is None:
            continue
        if w.ndim != 2 or h.ndim < 1 or h.shape[-1] != w.shape[1] or h.shape[:-1] != ids.shape:
            raise ValueError(
                f"{what}: {name}hidden (..., H), {name}weight (V, H) and ids (...) do not fit; got {given}"
            )
        if h.dtype != w.dtype or not h.is_floating_point():
            raise ValueError(f"{what}: {name}hidden and {name}weight must be floating, of one dtype; got {given}")
    if ref_weight is not None and ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(f"{what}: policy and reference need the same vocabulary; got {given}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{what}: chunk_rows must be at least 1, got {chunk_rows}")
    return check_arguments(what, weight.shape[0], ids, mask, temperature, softcap, tensors)
