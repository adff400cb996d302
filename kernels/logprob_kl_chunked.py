"""logprob_kl with torch operations on a few rows at a time, in reused buffers: any device, any dtype.

Every operation stays in the cache, and only the gradient is new memory. Notation as in docs/kernels.md.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lm_envs.kernels.logprob_kl import Options, Rows
from lm_envs.kernels.memory import empty_gradient
from lm_envs.kernels.threads import share

BLOCK = 2**18  # logits of a block of rows: its buffers fit the second-level cache of two cores; measured
CUDA_BLOCK = 2**26  # there, enough to fill the device
_GUARD = 8  # the row of stats that says where 0 * inf has to be taken care of


def unable(logits: Tensor, ref_logits: Tensor | None, options: Options) -> None:
    """It can always be used."""


def forward(given: Rows) -> Tensor:
    """Results and what backward needs, ``(9, N)``: logprob, ref_logprob, entropy, kl, m, log Z, n, log Q, guarded."""
    z, r, ids, keep, options = given
    stats = torch.zeros(9, ids.numel(), dtype=_accumulator(z), device=z.device)

    def work(blocks: Iterator[_Block]) -> None:
        buffers = _Buffers(z)
        for rows, x, y in _scaled_blocks(blocks, buffers, options):
            out, here = stats[:, rows], ids[rows].unsqueeze(1)
            dropped = None if keep is None or bool(keep[rows].all()) else ~keep[rows]
            if dropped is not None:  # what a masked row holds must not reach the arithmetic
                x = x.masked_fill(dropped.unsqueeze(1), 0.0)
                y = None if y is None else y.masked_fill(dropped.unsqueeze(1), 0.0)
            m = x.amax(1, keepdim=True)
            d = torch.sub(x, m, out=buffers(0, x))
            w = torch.exp(d, out=buffers(1, x))
            total = w.sum(1)
            a = _dot(w, d, buffers(3, x))
            excluded = not bool(a.isfinite().all())
            if excluded:
                a = _dot(w, d.masked_fill_(w == 0, 0.0), buffers(3, x))
            log_z = total.log()
            out[0] = (x.gather(1, here) - m).squeeze(1) - log_z
            out[2] = log_z - a / total
            out[4], out[5] = m.squeeze(1), log_z
            if y is not None:
                n = y.amax(1, keepdim=True)
                e = torch.sub(y, n, out=buffers(2, x))
                ref_total = torch.exp(e, out=buffers(3, x)).sum(1)
                log_q = ref_total.log()
                out[1] = (y.gather(1, here) - n).squeeze(1) - log_q
                out[6], out[7] = n.squeeze(1), log_q
                difference = torch.sub(d, e, out=buffers(3, x))
                b = _dot(w, difference, difference)
                if excluded or not bool(b.isfinite().all()):
                    excluded = True
                    d.masked_fill_(w == 0, 0.0)
                    torch.sub(d, e.masked_fill(w == 0, 0.0), out=difference)
                    b = _dot(w, difference, difference)
                out[3] = b / total - log_z + log_q
                if options.precise:
                    out[3] = _precise(d, w, e, total, ref_total, log_z, log_q)
            if dropped is not None:
                out.masked_fill_(dropped, 0.0)
            out[_GUARD] = float(excluded)

    _share(z, r, work)
    return stats


def _precise(d: Tensor, w: Tensor, e: Tensor, total: Tensor, ref_total: Tensor, log_z: Tensor, log_q: Tensor) -> Tensor:
    """``sum q - p + p u``, with ``exp(-u) - 1 + u`` where q and p are close."""
    p, q = w / total.unsqueeze(1), e.exp() / ref_total.unsqueeze(1)
    u = (d - e.masked_fill(p == 0, 0.0)) - (log_z - log_q).unsqueeze(1)
    near = torch.expm1(-u.clamp(-1, 1)) + u
    far = (q - p).add_(torch.where(p == 0, 0.0, p * u))
    return torch.where((u.abs() < 1) & (p > 0), p * near, far).sum(1)


def backward(given: Rows, stats: Tensor, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
    """``dz_v = ([v = a] g - p_v (c0 + c1 l_v + c2 k_v)) / T`` times the softcap's slope, ``(outer, inner, V)``.

    Args:
        coefficients: ``(4, N)``: g, c0, c1, c2.
        out: where to write it; may be ``z`` itself.
    """
    z, r, ids, keep, options = given
    dz = empty_gradient(z) if out is None else out
    flat = dz.view(-1, z.shape[-1])
    scale = 1.0 / options.temperature

    def work(blocks: Iterator[_Block]) -> None:
        buffers = _Buffers(z)
        for rows, x, y in _scaled_blocks(blocks, buffers, options):
            g, c0, c1, c2 = coefficients[:, rows].unsqueeze(2) * scale
            _, _, _, _, m, log_z, n, log_q, guard = stats[:, rows].unsqueeze(2)
            guarded = bool(guard.any()) or keep is not None
            t = torch.sub(x, m, out=buffers(0, x)).sub_(log_z)
            p = torch.exp(t, out=buffers(1, x))
            gone = p == 0 if guarded else None
            t.mul_(c1).add_(c0)
            if y is not None:
                k = torch.sub(y, n, out=buffers(2, x)).sub_(log_q)
                if guarded:
                    k.clamp_(min=torch.finfo(k.dtype).min)  # 0 * inf where the KL is not asked for
                t.addcmul_(k, c2)
            if gone is not None:
                t.masked_fill_(gone, 0.0)
            d = t.mul_(p).neg_().scatter_add_(1, ids[rows].unsqueeze(1), g)
            flat[rows].copy_(_finished(d, x, rows, given))

    _share(z, r, work)
    return dz


def backward_ref(given: Rows, stats: Tensor, coefficients: Tensor) -> Tensor:
    """``dr_v = ([v = a] g + c_p p_v + c_q q_v) / T`` times the softcap's slope; coefficients ``(3, N)``."""
    z, r, ids, _, options = given
    assert r is not None
    dr = empty_gradient(r)
    flat = dr.view(-1, r.shape[-1])

    def work(blocks: Iterator[_Block]) -> None:
        buffers = _Buffers(z)
        for rows, x, y in _scaled_blocks(blocks, buffers, options):
            assert y is not None
            g, c_p, c_q = coefficients[:, rows].unsqueeze(2) / options.temperature
            _, _, _, _, m, log_z, n, log_q, _ = stats[:, rows].unsqueeze(2)
            p = torch.sub(x, m, out=buffers(0, x)).sub_(log_z).exp_().mul_(c_p)
            q = torch.sub(y, n, out=buffers(1, x)).sub_(log_q).exp_()
            d = p.addcmul_(q, c_q).scatter_add_(1, ids[rows].unsqueeze(1), g)
            flat[rows].copy_(_finished(d, y, rows, given))

    _share(z, r, work)
    return dr


def _finished(d: Tensor, x: Tensor, rows: slice, given: Rows) -> Tensor:
    """A block's gradient in its scaled logits ``x`` as one in the logits; 0 in masked rows."""
    if given.options.softcap is not None:
        d.mul_(1 - (x * (given.options.temperature / given.options.softcap)).square_().clamp_(max=1.0))
    return d if given.keep is None else d.masked_fill_(~given.keep[rows].unsqueeze(1), 0.0)


def _accumulator(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _dot(a: Tensor, b: Tensor, product: Tensor) -> Tensor:
    """Row sums of a product. Not a matrix product: torch's sum adds pairwise, which a float32 dot product does not."""
    return torch.mul(a, b, out=product).sum(1)


class _Buffers:
    """Work space for one block, made when first asked for."""

    def __init__(self, z: Tensor) -> None:
        self._like = {"dtype": _accumulator(z), "device": z.device}
        self._shape = (min(_rows_of_a_block(z), z.shape[0] * z.shape[1]), z.shape[-1])
        self._made: dict[int, Tensor] = {}

    def __call__(self, number: int, like: Tensor) -> Tensor:
        if number not in self._made:
            self._made[number] = torch.empty(self._shape, **self._like)  # type: ignore[call-overload]
        return self._made[number][: len(like)]


_Block = tuple[slice, Tensor, Tensor | None]  # rows as a slice of all, and their logits (rows, V) as they came


def _share(z: Tensor, r: Tensor | None, work: Callable[[Iterator[_Block]], None]) -> None:
    """Call ``work`` with blocks of rows: in several threads on a CPU."""
    outer, inner, vocabulary = z.shape
    if outer > 1 and z.is_contiguous() and (r is None or r.is_contiguous()):
        z, r = z.view(1, -1, vocabulary), None if r is None else r.view(1, -1, vocabulary)
        outer, inner = 1, outer * inner
    step = _rows_of_a_block(z)

    def blocks() -> Iterator[_Block]:
        for o in range(outer):
            for i in range(0, inner, step):
                here = slice(i, min(i + step, inner))
                rows = slice(o * inner + here.start, o * inner + here.stop)
                yield rows, z[o, here], None if r is None else r[o, here]

    share(blocks(), outer * -(-inner // step) if z.device.type == "cpu" else 1, work)


def _scaled_blocks(blocks: Iterator[_Block], buffers: _Buffers, options: Options) -> Iterator[_Block]:
    """The same with scaled logits: the input itself where nothing is to be done."""
    for rows, z, r in blocks:
        yield rows, _scaled(z, buffers, 4, options), None if r is None else _scaled(r, buffers, 5, options)


def _rows_of_a_block(z: Tensor) -> int:
    return max(1, (CUDA_BLOCK if z.device.type == "cuda" else BLOCK) // z.shape[-1])


def _scaled(x: Tensor, buffers: _Buffers, number: int, options: Options) -> Tensor:
    if x.dtype == _accumulator(x) and options.softcap is None and options.temperature == 1.0:
        return x
    out = buffers(number, x).copy_(x)
    if options.softcap is not None:
        never = x == -math.inf
        out.div_(options.softcap).tanh_().mul_(options.softcap).masked_fill_(never, -math.inf)
    return out if options.temperature == 1.0 else out.div_(options.temperature)
