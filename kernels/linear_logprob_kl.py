"""logprob_kl from hidden states and an output matrix: the ``(N, V)`` logits never exist, forward or backward.

Rows are taken in chunks: a matrix product writes a chunk's logits into a reused buffer, which the implementations of
:mod:`lm_envs.kernels.logprob_kl` read. Upstream gradients come later, so backward computes the logits again;
:func:`linear_loss` knows the loss in advance and does not. docs/kernels.md counts the operations.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lm_envs.kernels.logprob_kl import (
    LogprobKL,
    Options,
    Rows,
    backend,
    backward_coefficients,
    check_arguments,
    choose,
    describe,
    each,
    logprob_kl_reference,
    results,
)

LinearImplementation = Literal["auto", "torch", "chunks", "tiled"]
Exclude = Callable[[Tensor, Tensor], object]  # logits (R, V), and which rows they are of

# Logits of a chunk, in numbers. On a CPU 2**23 make a quarter less memory of an update and products a third slower.
CHUNK = {"cpu": 2**25, "cuda": 2**27}


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
    bias: Tensor | None = None,
    exclude: Exclude | None = None,
    implementation: LinearImplementation = "auto",
    chunk_rows: int | None = None,
) -> LogprobKL:
    """Compute ``logprob_kl(hidden @ weight.T + bias, ref_hidden @ ref_weight.T, ids, ...)`` without the logits.

    Differentiable in ``hidden``, ``weight`` and ``bias``; the reference is a constant. Memory beyond inputs and
    gradients: a chunk's logits (two of them with a reference), and for weights in low precision their gradient in
    float32. Masked rows cost nothing. Logits are rounded to the dtype of ``hidden``, as those of a model are.

    Args:
        hidden: ``(..., H)`` floating, the policy's last hidden states.
        weight: ``(V, H)`` of its output layer, same dtype.
        ref_hidden, ref_weight: ``(..., H')`` and ``(V, H')`` of the reference, both or neither; a bias of its own can
            be a column beside a hidden state of 1.
        ids, temperature, softcap, mask, precise: as in :func:`lm_envs.kernels.logprob_kl.logprob_kl`.
        bias: ``(V,)`` of the output layer, same dtype.
        exclude: called with a chunk's logits ``(R, V)``, the policy's and the reference's, and with its rows of the
            flattened ``ids``, ``(R,)`` int64; sets those of excluded tokens to -inf in place, and changes nothing else.
        implementation: "torch" makes the logits; "chunks" is described above; "tiled" computes tiles of logits on the
            chip going forward (Triton) and is "chunks" going backward; "auto" is "chunks".
        chunk_rows: rows of a chunk; from the device and V if None.

    Returns:
        four tensors of the shape of ``ids``, float32 (float64 in, float64 out).

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit.
    """
    options = Options(float(temperature), softcap, precise)
    inputs = (hidden, weight, ref_hidden, ref_weight, bias, ids, mask)
    rows, flat, job = _prepare(*inputs, options, exclude, chunk_rows, implementation == "tiled")
    if implementation not in get_args(LinearImplementation):
        names = ", ".join(get_args(LinearImplementation))
        raise ValueError(f"implementation must be one of {names}, got {implementation!r}")
    if job.tiled and not (bias is None and exclude is None):
        raise ValueError('linear_logprob_kl: "tiled" takes neither bias nor exclude; "chunks" does')
    if implementation == "torch":
        logits = torch.nn.functional.linear(rows, weight, bias)
        r, q = job.ref_hidden, job.ref_weight
        ref_logits = None if r is None or q is None else r @ q.t()
        for given in (logits, ref_logits):
            if exclude is not None and given is not None:
                exclude(given.detach(), job.source)
        found = logprob_kl_reference(logits, ref_logits, flat, **options._asdict())
    else:
        found = _Linear.apply(rows, weight, bias, flat, job)
    return each(found, lambda x: job.spread(x, ids.shape))


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
    bias: Tensor | None = None,
    exclude: Exclude | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum a loss over rows, and take its gradients while the logits of a chunk are there: nothing is recomputed.

    Equal to ``loss(linear_logprob_kl(...), rows)`` over all rows at once. For PPO, say:
    ``lambda found, rows: ppo_clip_loss(found.logprob, old[rows], ...).sum() / n``.

    Args:
        loss: from the results of a chunk, each ``(R,)``, and which rows of the flattened ``ids`` they are, ``(R,)``
            int64, to a scalar that adds up over chunks. What else it depends on gets no gradient.

    Other arguments, and errors raised, as for :func:`linear_logprob_kl`.

    Returns:
        a scalar, differentiable in ``hidden``, ``weight`` and ``bias``.
    """
    options = Options(float(temperature), softcap, precise)
    inputs = (hidden, weight, ref_hidden, ref_weight, bias, ids, mask)
    rows, flat, job = _prepare(*inputs, options, exclude, chunk_rows, False)
    return _Loss.apply(rows, weight, bias, flat, job, loss)


class _Job(NamedTuple):
    """What is the same for every chunk, and gets no gradient."""

    options: Options
    tiled: bool
    chunk_rows: int
    exclude: Exclude | None
    source: Tensor  # of each row, its place in the flattened ids
    ref_hidden: Tensor | None
    ref_weight: Tensor | None

    def spread(self, x: Tensor, shape: torch.Size) -> Tensor:
        if self.source.numel() == shape.numel():
            return x.view(shape)
        return x.new_zeros(shape.numel()).index_copy(0, self.source, x).view(shape)


class _Chunks:
    """Logits of a chunk of rows in reused buffers, and the gradients that come from them."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, job: _Job) -> None:
        self.hidden, self.weight, self.bias, self.ids, self.job = hidden, weight, bias, ids, job
        shape = (1, min(job.chunk_rows, len(ids)), weight.shape[0])
        self._z, self._held = torch.empty(shape, dtype=hidden.dtype, device=hidden.device), -1
        r = job.ref_hidden
        self._r = None if r is None else torch.empty(shape, dtype=r.dtype, device=r.device)
        with torch.no_grad():
            chosen = "triton" if job.tiled else choose("auto", self._z, self._r, job.options)
        self.backend = backend("chunked" if chosen == "torch" else chosen)
        # Triton's tuning runs a kernel several times, so it must not write over what it reads.
        self._dz = torch.empty_like(self._z) if chosen == "triton" else self._z
        self._partial: Tensor | None = None

    def __iter__(self) -> Iterator[slice]:
        size, count = self.job.chunk_rows, len(self.ids)
        first = count % size or size  # the short one, since backward finds the last chunk's logits in the buffer
        return (slice(max(end - size, 0), end) for end in range(first, count + 1, size))

    def logits(self, rows: slice) -> Tensor:
        """The policy's, ``(1, R, V)``: those in the buffer, if they are of these rows."""
        if rows.start == self._held:
            return self._z[:, : len(self.ids[rows])]
        self._held = rows.start
        return self._product(self.hidden[rows], self.weight, self.bias, self._z, rows)

    def ref_logits(self, rows: slice) -> Tensor | None:
        """The reference's, ``(1, R, V)``."""
        if self._r is None or self.job.ref_hidden is None or self.job.ref_weight is None:
            return None
        return self._product(self.job.ref_hidden[rows], self.job.ref_weight, None, self._r, rows)

    def _product(self, h: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, rows: slice) -> Tensor:
        out = out[:, : len(h)]
        if bias is None:
            torch.mm(h, weight.t(), out=out[0])
        else:
            torch.addmm(bias, h, weight.t(), out=out[0])
        if self.job.exclude is not None:
            self.job.exclude(out[0], self.job.source[rows])
        return out

    def forward(self, z: Tensor, r: Tensor | None, rows: slice) -> Tensor:
        """The backend's sums of the chunk."""
        return self.backend.forward(Rows(z, r, self.ids[rows], None, self.job.options))

    def backward(
        self, z: Tensor, r: Tensor | None, rows: slice, stats: Tensor, coefficients: Tensor, into: "_Gradients"
    ) -> None:
        """Write the chunk's rows of the gradient in hidden and add its share to the others. Overwrites ``z``."""
        self._held = -1
        given = Rows(z, r, self.ids[rows], None, self.job.options)
        dz = self.backend.backward(given, stats, coefficients, out=self._dz[:, : z.shape[1]])[0]
        if into.hidden is not None:
            torch.mm(dz, self.weight, out=into.hidden[rows])
        if into.bias is not None:
            into.bias.add_(dz.sum(0, dtype=into.bias.dtype))
        if into.weight is None:
            return
        if into.weight.dtype == dz.dtype:
            into.weight.addmm_(dz.t(), self.hidden[rows])
        else:  # chunks add up in float32
            self._partial = torch.mm(dz.t(), self.hidden[rows], out=self._partial)
            into.weight.add_(self._partial)


class _Gradients(NamedTuple):
    """Room for the gradients that are asked for: sums over chunks in float32 at least."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]) -> "_Gradients":
        dh = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needed[0] else None
        exact = torch.promote_types(weight.dtype, torch.float32)
        dw = torch.zeros_like(weight, dtype=exact) if needed[1] else None
        return _Gradients(dh, dw, torch.zeros_like(bias, dtype=exact) if bias is not None and needed[2] else None)

    def rounded(self, weight: Tensor) -> tuple[Tensor | None, ...]:
        """In the dtype of hidden and weight."""
        return tuple(None if x is None else x.to(weight.dtype) for x in self)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, job: _Job):  # type: ignore[no-untyped-def]
        ctx.chunks = None
        if job.tiled:
            tiles = backend("triton_linear")
            stats = tiles.forward(hidden, weight, job.ref_hidden, job.ref_weight, ids, job.options)
        else:
            chunks = ctx.chunks = _Chunks(hidden, weight, bias, ids, job)
            parts = [chunks.forward(chunks.logits(rows), chunks.ref_logits(rows), rows) for rows in chunks]
            wide = torch.promote_types(hidden.dtype, torch.float32)
            stats = torch.cat(parts, dim=1) if parts else torch.zeros(9, 0, dtype=wide, device=ids.device)
        ctx.save_for_backward(hidden, weight, bias, ids, stats)
        ctx.job = job
        ctx.set_materialize_grads(False)
        found = results(stats, job.ref_hidden is not None)
        if found.ref_logprob is not None:
            ctx.mark_non_differentiable(found.ref_logprob)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, stats = ctx.saved_tensors
        chunks = ctx.chunks or _Chunks(hidden, weight, bias, ids, ctx.job)
        ctx.chunks = None  # their buffers are free before the rest of the backward pass
        coefficients, _ = backward_coefficients(stats, upstream)
        into = _Gradients.of(hidden, weight, bias, ctx.needs_input_grad)
        for rows in reversed(list(chunks)):  # the logits of the last are still there
            z = chunks.logits(rows)
            r = None if upstream[3] is None else chunks.ref_logits(rows)  # only the KL needs the reference's again
            chunks.backward(z, r, rows, stats[:, rows].contiguous(), coefficients[:, rows], into)
        return *into.rounded(weight), None, None


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, job: _Job,
        loss: Callable[[LogprobKL, Tensor], Tensor],
    ):  # fmt: skip
        chunks = _Chunks(hidden, weight, bias, ids, job)
        needed = ctx.needs_input_grad[:3]
        into = _Gradients.of(hidden, weight, bias, needed)
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=ids.device)
        for rows in chunks:
            z, r = chunks.logits(rows), chunks.ref_logits(rows)
            stats = chunks.forward(z, r, rows)
            found = results(stats, r is not None)
            inputs = [x for x in (found.logprob, found.entropy, found.kl) if x is not None]
            with torch.set_grad_enabled(any(needed)):
                for x in inputs if any(needed) else []:
                    x.requires_grad_()
                value = loss(found, job.source[rows])
                if value.shape != ():
                    raise ValueError(f"linear_loss: loss must return a scalar, got {describe(('value', value))}")
                total += value.detach()
            if not any(needed) or not value.requires_grad:
                if into.hidden is not None:
                    into.hidden[rows] = 0
                continue
            grads = (*torch.autograd.grad(value, inputs, allow_unused=True), None)
            coefficients, _ = backward_coefficients(stats, (grads[0], None, grads[1], grads[2]))
            chunks.backward(z, r if grads[2] is not None else None, rows, stats, coefficients, into)
        ctx.save_for_backward(*into.rounded(weight))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if x is None else x * upstream.to(x.dtype) for x in ctx.saved_tensors), *[None] * 3


def _chunk_rows(chosen: int | None, weight: Tensor, rows: int) -> int:
    return chosen or min(max(rows, 1), max(16, CHUNK.get(weight.device.type, CHUNK["cpu"]) // weight.shape[0]))


def _prepare(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor | None, ref_weight: Tensor | None, bias: Tensor | None,
    ids: Tensor, mask: Tensor | None, options: Options, exclude: Exclude | None, chunk_rows: int | None, tiled: bool,
) -> tuple[Tensor, Tensor, _Job]:  # fmt: skip
    """Check the arguments; the hidden states ``(R, H)`` and int64 ids ``(R,)`` of the rows that count, and the rest."""
    what, heads = "linear_logprob_kl", (("", hidden, weight), ("ref_", ref_hidden, ref_weight))
    tensors = [("hidden", hidden), ("weight", weight), ("ref_hidden", ref_hidden), ("ref_weight", ref_weight)]
    tensors += [("bias", bias), ("ids", ids), ("mask", mask)]
    given = describe(*tensors)
    if (ref_hidden is None) != (ref_weight is None):
        raise ValueError(f"{what}: ref_hidden and ref_weight go together; got {given}")
    for name, h, w in heads:
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
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"{what}: bias must be (V,) and of the weight's dtype; got {given}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{what}: chunk_rows must be at least 1, got {chunk_rows}")
    ids = check_arguments(what, weight.shape[0], ids, mask, options, tensors).reshape(-1)
    count = len(ids)
    source = torch.arange(count, device=ids.device) if mask is None else mask.reshape(-1).nonzero().squeeze(1)
    ids = ids if mask is None else ids[source]

    def rows_of(x: Tensor) -> Tensor:
        flat = x.reshape(count, x.shape[-1])
        return flat if mask is None else flat[source]

    r = None if ref_hidden is None else rows_of(ref_hidden.detach())
    q = None if ref_weight is None else ref_weight.detach()
    job = _Job(options, tiled, _chunk_rows(chunk_rows, weight, len(ids)), exclude, source, r, q)
    return rows_of(hidden), ids, job
