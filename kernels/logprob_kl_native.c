/* The inner loops of logprob_kl on a CPU: one row of logits at a time, one pass over it forward, one backward.
 *
 * Plain C with GCC's vector extension (clang takes it too), compiled on first use by logprob_kl_native.py; the notation
 * and the derivation are in docs/kernels.md. Everything is computed in float32 on registers and summed in float64 per
 * tile, so the sums do not lose digits with V. Threads are the caller's: rows [begin, end) are independent.
 *
 * Maxima are kept as logits, not divided by the temperature: (z - m) * scale has an error relative to itself, and it is
 * the same whether or not the compiler makes one instruction of a product and a sum. z * scale - m is not, where the
 * maximum of the rounded products is subtracted from an unrounded one.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define TILE 2048      /* elements that stay in the first-level cache between finding their maximum and summing them */
#define LOWEST -87.0f  /* exp below it is not a normal float: such a token counts as impossible, p = 0 */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef uint16_t half_vec __attribute__((vector_size(LANES * 2)));

INLINE vec splat(float x) { return x - (vec){0}; }
INLINE vec select_(ivec where, vec yes, vec no) { return (vec)(((ivec)yes & where) | ((ivec)no & ~where)); }
INLINE vec larger(vec a, vec b) { return select_(a > b, a, b); }

INLINE float sum(vec v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

INLINE float largest(vec v) {
  float found = v[0];
  for (int i = 1; i < LANES; i++) found = v[i] > found ? v[i] : found;
  return found;
}

/* exp for LOWEST <= x <= 88: 2^n times a Taylor polynomial on |r| <= log(2)/2, whose remainder is below 6e-9. */
INLINE vec exp_(vec x) {
  const float round = 12582912.0f; /* 1.5 * 2^23: adding it leaves the nearest integer in the low bits */
  vec shifted = x * 1.44269504f + round, n = shifted - round;
  vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f; /* log(2) in two parts, the first with trailing zeros */
  vec y = splat(1.0f / 5040) * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  return (vec)((ivec)y + ((ivec)shifted << 23));
}

/* Elements i .. i+15 of a row as float32; what lies behind `count` is -inf. */
INLINE vec load(const void *row, int64_t i, int64_t count, int bf16) {
  int64_t here = count - i < LANES ? count - i : LANES;
  if (bf16) {
    half_vec raw = {0};
    if (here == LANES) memcpy(&raw, (const uint16_t *)row + i, sizeof raw);
    else {
      memcpy(&raw, (const uint16_t *)row + i, here * 2);
      for (int64_t j = here; j < LANES; j++) raw[j] = 0xff80; /* -inf */
    }
    return (vec)(__builtin_convertvector(raw, uvec) << 16);
  }
  vec out = splat(-INFINITY);
  if (here == LANES) memcpy(&out, (const float *)row + i, sizeof out);
  else memcpy(&out, (const float *)row + i, here * 4);
  return out;
}

INLINE void store(void *row, int64_t i, int64_t count, vec v, int bf16) {
  int64_t here = count - i < LANES ? count - i : LANES;
  if (bf16) { /* to nearest, ties to even; NaN stays NaN */
    uvec bits = (uvec)v;
    bits += 0x7fff + ((bits >> 16) & 1);
    bits = (uvec)select_(v == v, (vec)bits, (vec)((uvec){0} + 0x7fc00000u));
    half_vec out = __builtin_convertvector(bits >> 16, half_vec);
    if (here == LANES) memcpy((uint16_t *)row + i, &out, sizeof out);
    else memcpy((uint16_t *)row + i, &out, here * 2);
  } else if (here == LANES) memcpy((float *)row + i, &v, sizeof v);
  else memcpy((float *)row + i, &v, here * 4);
}

INLINE float scalar(const void *row, int64_t i, int bf16) {
  if (!bf16) return ((const float *)row)[i];
  uint32_t bits = (uint32_t)((const uint16_t *)row)[i] << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

/* What one row needs to be remembered by. */
typedef struct {
  double m, Z, A;   /* max z, sum w, sum w*d, with d = (z - m)*scale and w = exp(d) */
  double n, Q, B;   /* max r, sum exp(e), with e = (r - n)*scale, and sum w*(d - e) */
  float bad;        /* the largest z where r is -inf */
} Row;

INLINE Row forward_row(const void *z, const void *r, int64_t V, double exact, int two, int bf16) {
  float scale = exact;
  Row s = {-INFINITY, 0, 0, -INFINITY, 0, 0, -INFINITY};
  vec bad = splat(-INFINITY);
  for (int64_t start = 0; start < V; start += TILE) {
    int64_t end = start + TILE < V ? start + TILE : V;
    vec top = splat(-INFINITY), ref_top = splat(-INFINITY);
    for (int64_t i = start; i < end; i += LANES) {
      top = larger(load(z, i, V, bf16), top);
      if (two) ref_top = larger(load(r, i, V, bf16), ref_top);
    }
    double m = fmax(s.m, largest(top)), n = fmax(s.n, largest(ref_top));
    /* Move what was summed so far to the new maxima. A maximum of -inf means that nothing was summed. */
    double dm = isinf(s.m) ? 0 : (s.m - m) * exact, dn = isinf(s.n) ? 0 : (s.n - n) * exact, f = exp(dm);
    s.A = f * (s.A + s.Z * dm);
    s.B = f * (s.B + s.Z * (dm - dn));
    s.Z *= f;
    s.Q *= exp(dn);
    s.m = m;
    s.n = n;
    float peak = isinf(m) ? 0 : m, ref_peak = isinf(n) ? 0 : n;
    vec Z = {0}, A = {0}, Q = {0}, B = {0};
    for (int64_t i = start; i < end; i += LANES) {
      vec x = load(z, i, V, bf16), d = (x - peak) * scale;
      ivec gone = d < LOWEST;
      d = select_(gone, splat(LOWEST), d);
      vec w = select_(gone, (vec){0}, exp_(d));
      Z += w;
      A += w * d;
      if (!two) continue;
      vec y = load(r, i, V, bf16), e = (y - ref_peak) * scale;
      ivec none = e < LOWEST, never = y == -INFINITY;
      Q += select_(none, (vec){0}, exp_(select_(none, splat(LOWEST), e)));
      B += w * (d - select_(never, d, e));
      bad = select_(never, larger(x, bad), bad);
    }
    s.Z += sum(Z);
    s.A += sum(A);
    s.Q += sum(Q);
    s.B += sum(B);
  }
  s.bad = largest(bad);
  return s;
}

/* sum_v q - p + p*u with u = l - k, every term >= 0 and computed without cancelling where u is small. */
INLINE double precise_kl(const void *z, const void *r, int64_t V, float scale, const Row *s, int bf16) {
  double total = 0;
  float m = s->m, log_Z = log(s->Z), n = s->n, log_Q = log(s->Q);
  for (int64_t start = 0; start < V; start += TILE) {
    int64_t end = start + TILE < V ? start + TILE : V;
    vec K = {0};
    for (int64_t i = start; i < end; i += LANES) {
      vec l = (load(z, i, V, bf16) - m) * scale - log_Z, k = (load(r, i, V, bf16) - n) * scale - log_Q;
      ivec gone = l < LOWEST, none = k < LOWEST;
      vec p = select_(gone, (vec){0}, exp_(select_(gone, splat(LOWEST), l)));
      vec q = select_(none, (vec){0}, exp_(select_(none, splat(LOWEST), k)));
      vec u = l - k, t = splat(1.0f / 5040) - u * (1.0f / 40320);
      ivec near = (u < 0.5f) & (u > -0.5f);
      t = 1.0f / 720 - u * t; /* exp(-u) - 1 + u = u^2 (1/2 - u/6 + u^2/24 - ...) */
      t = 1.0f / 120 - u * t;
      t = 1.0f / 24 - u * t;
      t = 1.0f / 6 - u * t;
      t = 0.5f - u * t;
      vec far = select_(gone, q, (q - p) + p * u);
      K += select_(near & ~gone, p * u * u * t, far);
    }
    total += sum(K);
  }
  return total;
}

/* Rows are (outer, inner) pairs of two strides. stats is (8, N): logprob, ref_logprob, entropy, kl, m, log Z, n,
 * log Q. Rows that are not kept are 0 and their logits are not read. */
INLINE void forward_rows(const char *z, const char *r, const int64_t *ids, const uint8_t *keep, int64_t begin,
                         int64_t end, int64_t N, int64_t inner, int64_t V, const int64_t *strides, double scale,
                         int precise, float *stats, int bf16) {
  int64_t width = bf16 ? 2 : 4;
  for (int64_t row = begin; row < end; row++) {
    if (keep && !keep[row]) {
      for (int k = 0; k < 8; k++) stats[k * N + row] = 0;
      continue;
    }
    int64_t o = row / inner, i = row % inner;
    const char *x = z + (o * strides[0] + i * strides[1]) * width;
    const char *y = r ? r + (o * strides[2] + i * strides[3]) * width : 0;
    Row s = r ? forward_row(x, y, V, scale, 1, bf16) : forward_row(x, y, V, scale, 0, bf16);
    double log_Z = log(s.Z), log_Q = log(s.Q);
    stats[row] = (scalar(x, ids[row], bf16) - s.m) * scale - log_Z;
    stats[2 * N + row] = log_Z - s.A / s.Z;
    stats[4 * N + row] = s.m;
    stats[5 * N + row] = log_Z;
    if (!r) continue;
    double kl = s.B / s.Z - log_Z + log_Q;
    if (precise) kl = precise_kl(x, y, V, scale, &s, bf16);
    stats[N + row] = (scalar(y, ids[row], bf16) - s.n) * scale - log_Q;
    stats[3 * N + row] = (s.bad - s.m) * scale - log_Z >= LOWEST ? INFINITY : kl;
    stats[6 * N + row] = s.n;
    stats[7 * N + row] = log_Q;
  }
}

/* dz_v = scale * ([v = a]*g - p_v*(c0 + c1*l_v + c2*k_v)); coefficients is (4, N): g, c0, c1, c2. dz is (N, V). */
INLINE void backward_rows(const char *z, const char *r, const int64_t *ids, const uint8_t *keep, int64_t begin,
                          int64_t end, int64_t N, int64_t inner, int64_t V, const int64_t *strides, double exact,
                          const float *stats, const float *coefficients, char *dz, int bf16) {
  float scale = exact;
  int64_t width = bf16 ? 2 : 4;
  for (int64_t row = begin; row < end; row++) {
    char *out = dz + row * V * width;
    if (keep && !keep[row]) {
      memset(out, 0, V * width);
      continue;
    }
    int64_t o = row / inner, i = row % inner, a = ids[row];
    const char *x = z + (o * strides[0] + i * strides[1]) * width;
    const char *y = r ? r + (o * strides[2] + i * strides[3]) * width : 0;
    float m = stats[4 * N + row], log_Z = stats[5 * N + row], n = stats[6 * N + row], log_Q = stats[7 * N + row];
    float g = coefficients[row], c0 = coefficients[N + row], c1 = coefficients[2 * N + row];
    float c2 = coefficients[3 * N + row];
    vec at = {0};
    for (int64_t v = 0; v < V; v += LANES) {
      vec l = (load(x, v, V, bf16) - m) * scale - log_Z;
      ivec gone = l < LOWEST;
      l = select_(gone, splat(LOWEST), l);
      vec t = l * c1 + c0;
      if (r) t += larger((load(y, v, V, bf16) - n) * scale - log_Q, splat(-3e38f)) * c2;
      vec d = select_(gone, (vec){0}, exp_(l) * t * -scale);
      store(out, v, V, d, bf16);
      if (a >= v && a < v + LANES) at = splat(d[a - v]); /* in float32, before it is rounded */
    }
    float target = at[0] + g * scale;
    vec one = splat(target);
    store(out, a, a + 1, one, bf16);
  }
}

#define ENTRY(name, bf16)                                                                                             \
  void forward_##name(const char *z, const char *r, const int64_t *ids, const uint8_t *keep, int64_t begin,           \
                      int64_t end, int64_t N, int64_t inner, int64_t V, const int64_t *strides, double scale,          \
                      int precise, float *stats) {                                                                    \
    forward_rows(z, r, ids, keep, begin, end, N, inner, V, strides, scale, precise, stats, bf16);                     \
  }                                                                                                                   \
  void backward_##name(const char *z, const char *r, const int64_t *ids, const uint8_t *keep, int64_t begin,          \
                       int64_t end, int64_t N, int64_t inner, int64_t V, const int64_t *strides, double scale,         \
                       const float *stats, const float *coefficients, char *dz) {                                     \
    if (r) backward_rows(z, r, ids, keep, begin, end, N, inner, V, strides, scale, stats, coefficients, dz, bf16);    \
    else backward_rows(z, 0, ids, keep, begin, end, N, inner, V, strides, scale, stats, coefficients, dz, bf16);      \
  }

ENTRY(float32, 0)
ENTRY(bfloat16, 1)
