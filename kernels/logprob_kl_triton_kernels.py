"""The device code of logprob_kl in Triton; :mod:`lm_envs.kernels.logprob_kl_triton` launches it.

Temperature, softcap and sizes are runtime arguments, so that nothing is compiled again for them. Float arguments reach
a kernel as float32, so each is a pair whose sum is exact enough for float64. Notation as in docs/kernels.md.
"""

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Nothing can be timed under the interpreter: with a single entry nothing is.
_SIZES = [(1024, 4)] if INTERPRETED else [(1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 8), (8192, 16)]
_CONFIGS = [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in _SIZES]
_CHANGING = ["N", "inner", "bucket"]  # not to be specialized on


@triton.jit
def _join(high, low, ACC: tl.constexpr):
    """A float argument in the kernel's type."""
    return tl.full((), 0, ACC) + high + low


@triton.jit
def _tanh(a, ACC: tl.constexpr):
    """tanh with a small absolute error from exp, and with a small relative one near 0 from its series."""
    t = tl.exp(-2 * tl.abs(a))
    out = tl.where(a < 0, -1.0, 1.0) * (1 - t) / (1 + t)
    if ACC == tl.float32:
        s = a * a
        near = a * (1 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835 - s * (1382.0 / 155925))))))
        out = tl.where(s < 0.09, near, out)
    return out


@triton.jit
def _load(row, cols, stride, inside, inv_t, cap, ACC: tl.constexpr, SOFTCAP: tl.constexpr, STRIDED: tl.constexpr):
    """Scaled logits of a row; -inf where there are none, behind the softcap too."""
    if STRIDED:
        cols = cols.to(tl.int64) * stride
    x = tl.load(row + cols, mask=inside, other=float("-inf")).to(ACC)
    if SOFTCAP:
        x = tl.where(x == float("-inf"), x, cap * _tanh(x / cap, ACC))
    return x * inv_t


@triton.jit
def _finish(stats, row, N, m, Z, A, n, Q, B, bad, x_a, y_a, kept, TWO: tl.constexpr):
    """Results of a row from its sums, and what backward needs: ``stats (8, N)``."""
    N = N.to(tl.int64)
    log_z = tl.log(Z)
    tl.store(stats + row, tl.where(kept, x_a - m - log_z, 0.0))
    tl.store(stats + 2 * N + row, tl.where(kept, log_z - A / Z, 0.0))
    tl.store(stats + 4 * N + row, m)
    tl.store(stats + 5 * N + row, log_z)
    if TWO:
        log_q = tl.log(Q)
        kl = B / Z - log_z + log_q
        # The reference excludes a token whose probability is not 0.
        kl = tl.where(tl.exp(bad - m - log_z) > 0, float("inf"), kl)
        tl.store(stats + N + row, tl.where(kept, y_a - n - log_q, 0.0))
        tl.store(stats + 3 * N + row, tl.where(kept, kl, 0.0))
        tl.store(stats + 6 * N + row, n)
        tl.store(stats + 7 * N + row, log_q)


@triton.autotune(_CONFIGS, key=["bucket", "SPLIT", "TWO", "ACC"])
@triton.jit(do_not_specialize=_CHANGING)
def _forward_kernel(
    z, r, ids, keep, stats, partial, N, inner, V, bucket, z_outer, z_inner, z_stride, r_outer, r_inner, r_stride,
    inv_t_high, inv_t_low, cap_high, cap_low,
    SPLIT: tl.constexpr, TWO: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, STRIDED: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, or the part-th of SPLIT equal parts of it: sums relative to running maxima m of x and n of y.

    Lanes sum on their own and are added up at the end; only the maxima are shared in every block.
    """
    row = (tl.program_id(0) // SPLIT).to(tl.int64)
    part = tl.program_id(0) % SPLIT
    outer, place = row // inner, row % inner
    x_row = z + outer * z_outer + place * z_inner
    y_row = r + outer * r_outer + place * r_inner
    inv_t = _join(inv_t_high, inv_t_low, ACC)
    cap = _join(cap_high, cap_low, ACC)
    kept = row >= 0
    if MASKED:
        kept = tl.load(keep + row) != 0
    length = tl.cdiv(V, SPLIT)
    begin = part * length
    end = tl.where(kept, tl.minimum(begin + length, V), begin)  # a masked row's logits are not read

    NONE: tl.constexpr = float("-inf")
    lanes = tl.arange(0, BLOCK)
    m = tl.max(tl.full([BLOCK], NONE, ACC), 0)
    n = m
    Z = tl.zeros([BLOCK], ACC)
    A = tl.zeros([BLOCK], ACC)
    Q = tl.zeros([BLOCK], ACC)
    B = tl.zeros([BLOCK], ACC)
    bad = tl.full([BLOCK], NONE, ACC)
    for start in range(begin, end, BLOCK):
        cols = start + lanes
        inside = cols < end
        x = _load(x_row, cols, z_stride, inside, inv_t, cap, ACC, SOFTCAP, STRIDED)
        top = tl.maximum(m, tl.max(x, 0))
        peak = tl.where(top == NONE, 0.0, top)  # -inf - -inf would be NaN
        f = tl.exp(m - peak)
        dm = tl.where(m == NONE, 0.0, m - peak)
        d = x - peak
        w = tl.exp(d)
        A = f * (A + Z * dm) + tl.where(w == 0, 0.0, w * d)
        if TWO:
            y = _load(y_row, cols, r_stride, inside, inv_t, cap, ACC, SOFTCAP, STRIDED)
            ref_top = tl.maximum(n, tl.max(y, 0))
            ref_peak = tl.where(ref_top == NONE, 0.0, ref_top)
            dn = tl.where(n == NONE, 0.0, n - ref_peak)
            e = y - ref_peak
            Q = Q * tl.exp(n - ref_peak) + tl.exp(e)
            B = f * (B + Z * (dm - dn)) + tl.where((w == 0) | (y == NONE), 0.0, w * (d - e))
            bad = tl.maximum(bad, tl.where(y == NONE, x, NONE))
            n = ref_top
        Z = Z * f + w
        m = top

    Z1, A1, Q1, B1, bad1 = tl.sum(Z, 0), tl.sum(A, 0), tl.sum(Q, 0), tl.sum(B, 0), tl.max(bad, 0)
    if SPLIT == 1:
        a = tl.load(ids + row)
        real = (a >= 0) & (a < V) & kept
        x_a = _target(x_row, a, z_stride, real, inv_t, cap, ACC, SOFTCAP)
        y_a = x_a
        if TWO:
            y_a = _target(y_row, a, r_stride, real, inv_t, cap, ACC, SOFTCAP)
        _finish(stats, row, N, m, Z1, A1, n, Q1, B1, bad1, x_a, y_a, kept, TWO)
    else:
        place = partial + tl.program_id(0).to(tl.int64) * 7
        tl.store(place, m)
        tl.store(place + 1, Z1)
        tl.store(place + 2, A1)
        tl.store(place + 3, n)
        tl.store(place + 4, Q1)
        tl.store(place + 5, B1)
        tl.store(place + 6, bad1)


@triton.jit
def _target(row, a, stride, real, inv_t, cap, ACC: tl.constexpr, SOFTCAP: tl.constexpr):
    """The scaled logit of the sampled token; NaN for an id outside the vocabulary."""
    x = tl.load(row + a * stride, mask=real, other=float("nan")).to(ACC)
    if SOFTCAP:
        x = tl.where(x == float("-inf"), x, cap * _tanh(x / cap, ACC))
    return x * inv_t


@triton.jit(do_not_specialize=_CHANGING)
def _combine_kernel(
    z, r, ids, keep, stats, partial, N, inner, V, z_outer, z_inner, z_stride, r_outer, r_inner, r_stride, inv_t_high,
    inv_t_low, cap_high, cap_low,
    SPLIT: tl.constexpr, TWO: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A row's SPLIT parts, moved to common maxima and added up. SPLIT is a power of two."""
    row = tl.program_id(0).to(tl.int64)
    outer, place = row // inner, row % inner
    inv_t = _join(inv_t_high, inv_t_low, ACC)
    cap = _join(cap_high, cap_low, ACC)
    kept = row >= 0
    if MASKED:
        kept = tl.load(keep + row) != 0
    NONE: tl.constexpr = float("-inf")
    parts = partial + (row * SPLIT + tl.arange(0, SPLIT)) * 7
    m, Z, A = tl.load(parts), tl.load(parts + 1), tl.load(parts + 2)
    n, Q, B, bad = tl.load(parts + 3), tl.load(parts + 4), tl.load(parts + 5), tl.load(parts + 6)
    top, ref_top = tl.max(m, 0), tl.max(n, 0)
    f = tl.where(m == NONE, 0.0, tl.exp(m - top))
    dm = tl.where(m == NONE, 0.0, m - top)
    dn = tl.where(n == NONE, 0.0, n - ref_top)
    A1 = tl.sum(f * (A + Z * dm), 0)
    B1 = tl.sum(f * (B + Z * (dm - dn)), 0)
    Z1 = tl.sum(f * Z, 0)
    Q1 = tl.sum(tl.where(n == NONE, 0.0, Q * tl.exp(dn)), 0)
    a = tl.load(ids + row)
    real = (a >= 0) & (a < V) & kept
    x_a = _target(z + outer * z_outer + place * z_inner, a, z_stride, real, inv_t, cap, ACC, SOFTCAP)
    y_a = x_a
    if TWO:
        y_a = _target(r + outer * r_outer + place * r_inner, a, r_stride, real, inv_t, cap, ACC, SOFTCAP)
    _finish(stats, row, N, top, Z1, A1, ref_top, Q1, B1, tl.max(bad, 0), x_a, y_a, kept, TWO)


@triton.autotune(_CONFIGS, key=["bucket", "ACC"])
@triton.jit(do_not_specialize=_CHANGING)
def _precise_kernel(
    z, r, keep, stats, N, inner, V, bucket, z_outer, z_inner, z_stride, r_outer, r_inner, r_stride, inv_t_high,
    inv_t_low, cap_high, cap_low,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, STRIDED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``sum q - p + p u``, every term >= 0; where q and p are close ``exp(-u) - 1 + u`` by its series."""
    row = tl.program_id(0).to(tl.int64)
    outer, place = row // inner, row % inner
    x_row = z + outer * z_outer + place * z_inner
    y_row = r + outer * r_outer + place * r_inner
    inv_t = _join(inv_t_high, inv_t_low, ACC)
    cap = _join(cap_high, cap_low, ACC)
    N = N.to(tl.int64)
    m, log_z = tl.load(stats + 4 * N + row), tl.load(stats + 5 * N + row)
    n, log_q = tl.load(stats + 6 * N + row), tl.load(stats + 7 * N + row)
    kl = tl.load(stats + 3 * N + row)
    end = V
    if MASKED:
        end = tl.where(tl.load(keep + row) != 0, V, 0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, end, BLOCK):
        cols = start + lanes
        inside = cols < end
        l_v = _load(x_row, cols, z_stride, inside, inv_t, cap, ACC, SOFTCAP, STRIDED) - m - log_z
        k_v = _load(y_row, cols, r_stride, inside, inv_t, cap, ACC, SOFTCAP, STRIDED) - n - log_q
        p, q = tl.exp(l_v), tl.exp(k_v)
        u = l_v - k_v
        t = 1.0 / 3628800 - u * (1.0 / 39916800)
        t = 1.0 / 362880 - u * t
        t = 1.0 / 40320 - u * t
        t = 1.0 / 5040 - u * t
        t = 1.0 / 720 - u * t
        t = 1.0 / 120 - u * t
        t = 1.0 / 24 - u * t
        t = 1.0 / 6 - u * t
        near = p * u * u * (0.5 - u * t)
        far = tl.where(p > 0, (q - p) + p * u, q)
        total += tl.where(inside, tl.where((tl.abs(u) < 0.5) & (p > 0), near, far), 0.0)
    found = tl.sum(total, 0)
    tl.store(stats + 3 * N + row, tl.where((kl == float("inf")) | (end == 0), kl, found))


@triton.autotune(_CONFIGS, key=["bucket", "TWO", "ACC"])
@triton.jit(do_not_specialize=_CHANGING)
def _backward_kernel(
    z, r, ids, keep, stats, coefficients, dz, N, inner, V, bucket, z_outer, z_inner, z_stride, r_outer, r_inner,
    r_stride, inv_t_high, inv_t_low, cap_high, cap_low,
    TWO: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, STRIDED: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row of ``dz_v = ([v = a] g - p_v (c0 + c1 l_v + c2 k_v)) / T``."""
    blocks = tl.cdiv(V, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    outer, place = row // inner, row % inner
    inv_t = _join(inv_t_high, inv_t_low, ACC)
    cap = _join(cap_high, cap_low, ACC)
    N = N.to(tl.int64)
    kept = row >= 0
    if MASKED:
        kept = tl.load(keep + row) != 0
    m, log_z = tl.load(stats + 4 * N + row), tl.load(stats + 5 * N + row)
    g, c0 = tl.load(coefficients + row), tl.load(coefficients + N + row)
    c1, c2 = tl.load(coefficients + 2 * N + row), tl.load(coefficients + 3 * N + row)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < V
    here = cols < tl.where(kept, V, 0)  # a masked row's logits are not read
    x = _load(z + outer * z_outer + place * z_inner, cols, z_stride, here, inv_t, cap, ACC, SOFTCAP, STRIDED)
    l_v = x - m - log_z
    p = tl.exp(l_v)
    t = c0 + c1 * l_v
    if TWO:
        n, log_q = tl.load(stats + 6 * N + row), tl.load(stats + 7 * N + row)
        y = _load(r + outer * r_outer + place * r_inner, cols, r_stride, here, inv_t, cap, ACC, SOFTCAP, STRIDED)
        t += tl.where(c2 == 0, 0.0, c2 * (y - n - log_q))
    d = tl.where(p == 0, 0.0, -p * t) + tl.where(cols == tl.load(ids + row), g, 0.0)
    d *= inv_t
    if SOFTCAP:
        slope = x / (cap * inv_t)
        d *= tl.where(x == float("-inf"), 0.0, 1 - slope * slope)
    d = tl.where(kept, d, 0.0)
    tl.store(dz + row * V + cols, d.to(dz.dtype.element_ty), mask=inside)
