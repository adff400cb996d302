"""The linear form's forward in Triton: tiles of logits are made on the chip, used and forgotten.

A program holds some rows and walks over a part of the vocabulary; a small second step joins the parts. Notation as in
docs/kernels.md.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm_envs.kernels.logprob_kl import Options
from lm_envs.kernels.logprob_kl_triton import _on, _pair
from lm_envs.kernels.logprob_kl_triton_kernels import INTERPRETED, _join, _tanh

# (rows, vocabulary, width) of a tile, warps, stages
_SIZES = [(64, 64, 32, 4, 3), (64, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3)]
_CONFIGS = [
    triton.Config({"ROWS": m, "COLS": n, "DEPTH": k}, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in ([(16, 16, 16, 4, 1)] if INTERPRETED else _SIZES)
]


@triton.jit
def _rounded(x, DTYPE: tl.constexpr, ACC: tl.constexpr):
    """To the nearest number of another type; bfloat16 by its bits, because the interpreter cuts them off."""
    if DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE).to(ACC)


@triton.jit
def _tile(
    hidden, weight, rows, cols, row_here, col_here, width, h_row, h_col, w_row, w_col, inv_t, cap,
    SOFTCAP: tl.constexpr, LIFT: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Scaled logits of a tile, ``(ROWS, COLS)``; -inf where there are none."""
    total = tl.zeros([ROWS, COLS], ACC)
    depth = tl.arange(0, DEPTH)
    for start in range(0, width, DEPTH):
        k = start + depth
        here = k < width
        a = tl.load(
            hidden + rows[:, None] * h_row + k[None, :] * h_col, mask=row_here[:, None] & here[None, :], other=0.0
        )
        b = tl.load(
            weight + cols[None, :] * w_row + k[:, None] * w_col, mask=col_here[None, :] & here[:, None], other=0.0
        )
        if LIFT:
            a, b = a.to(ACC), b.to(ACC)
        total += tl.dot(a, b, out_dtype=ACC, input_precision="ieee")
    total = _rounded(total, hidden.dtype.element_ty, ACC)  # as backward will see them
    if SOFTCAP:
        total = cap * _tanh(total / cap, ACC)
    return tl.where(col_here[None, :], total * inv_t, float("-inf"))


@triton.autotune(_CONFIGS, key=["width", "bucket", "TWO", "ACC"])
@triton.jit(do_not_specialize=["N", "bucket"])
def _forward_kernel(
    hidden, weight, ref_hidden, ref_weight, ids, partial, N, V, width, ref_width, bucket, h_row, h_col, w_row, w_col,
    s_row, s_col, q_row, q_col, inv_t_high, inv_t_low, cap_high, cap_low,
    PARTS: tl.constexpr, TWO: tl.constexpr, SOFTCAP: tl.constexpr, LIFT: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``partial (8, PARTS, N)``: m, Z, A, n, Q, B and the sampled token's logits of both, of a part of the vocabulary.

    Programs next to each other share a part and so the tiles of the weights.
    """
    blocks = tl.cdiv(N, ROWS)
    part = tl.program_id(0) // blocks
    rows = ((tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_here = rows < N
    a = tl.load(ids + rows, mask=row_here, other=-1)
    inv_t, cap = _join(inv_t_high, inv_t_low, ACC), _join(cap_high, cap_low, ACC)
    length = tl.cdiv(V, PARTS)
    begin = part * length
    end = tl.minimum(begin + length, V)
    NONE: tl.constexpr = float("-inf")
    m = tl.full([ROWS], NONE, ACC)
    n = tl.full([ROWS], NONE, ACC)
    Z = tl.zeros([ROWS], ACC)
    A = tl.zeros([ROWS], ACC)
    Q = tl.zeros([ROWS], ACC)
    B = tl.zeros([ROWS], ACC)
    x_a = tl.zeros([ROWS], ACC)
    y_a = tl.zeros([ROWS], ACC)
    for start in range(begin, end, COLS):
        cols = (start + tl.arange(0, COLS)).to(tl.int64)
        here = cols < end
        x = _tile(
            hidden, weight, rows, cols, row_here, here, width, h_row, h_col, w_row, w_col, inv_t, cap,
            SOFTCAP, LIFT, ACC, ROWS, COLS, DEPTH,
        )  # fmt: skip
        sampled = here[None, :] & (cols[None, :] == a[:, None])
        x_a += tl.sum(tl.where(sampled, x, 0.0), 1)
        top = tl.maximum(m, tl.max(x, 1))
        f = tl.exp(m - top)  # a matrix product has no -inf, so every maximum is finite after the first tile
        dm = tl.where(m == NONE, 0.0, m - top)
        d = x - top[:, None]
        w = tl.exp(d)
        A = f * (A + Z * dm) + tl.sum(tl.where(w == 0, 0.0, w * d), 1)
        if TWO:
            y = _tile(
                ref_hidden, ref_weight, rows, cols, row_here, here, ref_width, s_row, s_col, q_row, q_col, inv_t, cap,
                SOFTCAP, LIFT, ACC, ROWS, COLS, DEPTH,
            )  # fmt: skip
            y_a += tl.sum(tl.where(sampled, y, 0.0), 1)
            ref_top = tl.maximum(n, tl.max(y, 1))
            dn = tl.where(n == NONE, 0.0, n - ref_top)
            e = y - ref_top[:, None]
            Q = Q * tl.exp(n - ref_top) + tl.sum(tl.exp(e), 1)
            B = f * (B + Z * (dm - dn)) + tl.sum(tl.where(w == 0, 0.0, w * (d - e)), 1)
            n = ref_top
        Z = Z * f + tl.sum(w, 1)
        m = top
    place = partial + part.to(tl.int64) * N + rows
    plane = N.to(tl.int64) * PARTS
    tl.store(place, m, mask=row_here)
    tl.store(place + plane, Z, mask=row_here)
    tl.store(place + 2 * plane, A, mask=row_here)
    tl.store(place + 3 * plane, n, mask=row_here)
    tl.store(place + 4 * plane, Q, mask=row_here)
    tl.store(place + 5 * plane, B, mask=row_here)
    tl.store(place + 6 * plane, x_a, mask=row_here)
    tl.store(place + 7 * plane, y_a, mask=row_here)


def forward(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor | None, ref_weight: Tensor | None, ids: Tensor, options: Options
) -> Tensor:
    """The sums of :func:`lm_envs.kernels.logprob_kl_triton.forward`; ValueError without CUDA or for a precise KL."""
    if hidden.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f'"tiled" needs CUDA, or TRITON_INTERPRET=1 before triton is imported; got {hidden.device}')
    if options.precise:
        raise ValueError('"tiled" sums the KL in one pass: use implementation="chunks" with precise=True')
    rows, vocabulary = len(ids), weight.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    parts = _parts(rows, hidden.device)
    partial = torch.empty(8, parts, rows, dtype=wide, device=hidden.device)
    if rows == 0:
        return partial.new_zeros(8, 0)
    two = ref_hidden is not None
    s, q = (hidden, weight) if ref_hidden is None or ref_weight is None else (ref_hidden, ref_weight)
    high, low = _pair(1.0 / options.temperature)
    cap_high, cap_low = _pair(options.softcap or 1.0)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(rows, meta["ROWS"]) * parts,)

    with _on(hidden):
        _forward_kernel[grid](
            hidden, weight, s, q, ids, partial, rows, vocabulary, hidden.shape[1], s.shape[1], vocabulary.bit_length(),
            *hidden.stride(), *weight.stride(), *s.stride(), *q.stride(), high, low, cap_high, cap_low,
            PARTS=parts, TWO=two, SOFTCAP=options.softcap is not None,
            LIFT=INTERPRETED,  # which takes bfloat16 tiles for integers in a product
            ACC=tl.float64 if wide == torch.float64 else tl.float32,
        )  # fmt: skip
    return _joined(partial, two)


def _parts(rows: int, device: torch.device) -> int:
    """Parts of the vocabulary: enough programs to fill the device some times over."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(64, 4 * processors // max(1, rows // 128)))


def _joined(partial: Tensor, two: bool) -> Tensor:
    """Parts moved to common maxima and added up: ``(N,)`` vectors, next to nothing beside the products."""
    # The last parts are empty where V is less than parts * ceil(V / parts): maximum -inf, sums 0.
    m, Z, A, n, Q, B, x_a, y_a = partial
    out = partial.new_zeros(8, partial.shape[2])
    top = m.amax(0)
    dm = torch.where(m == -torch.inf, 0.0, m - top)
    f = dm.exp()
    total = (f * Z).sum(0)
    log_z = total.log()
    out[0] = x_a.sum(0) - top - log_z
    out[2] = log_z - (f * (A + Z * dm)).sum(0) / total
    out[4], out[5] = top, log_z
    if two:
        ref_top = n.amax(0)
        dn = torch.where(n == -torch.inf, 0.0, n - ref_top)
        log_q = (Q * dn.exp()).sum(0).log()
        out[1] = y_a.sum(0) - ref_top - log_q
        out[3] = (f * (B + Z * (dm - dn))).sum(0) / total - log_z + log_q
        out[6], out[7] = ref_top, log_q
    return out
