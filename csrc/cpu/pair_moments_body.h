// Pair moments of one task, for one instruction set.

// One chunk in fp32 lanes. Returns false where a square may have left the range of fp32 (or nothing is there to square).
template <class T>
FASTMON_FN bool chunk_fast(const T* x, const T* y, int64_t n, PairPart* out) {
  vf dot_a = {}, dot_b = {}, xx_a = {}, xx_b = {}, yy_a = {}, yy_b = {}, dd_a = {}, dd_b = {};
  const int64_t full = n / U * U;
  for (int64_t i = 0; i < full; i += U) {
    __builtin_prefetch(reinterpret_cast<const char*>(x + i) + 1024);
    __builtin_prefetch(reinterpret_cast<const char*>(y + i) + 1024);
    if (sizeof(T) == 4) {
      __builtin_prefetch(reinterpret_cast<const char*>(x + i) + 1024 + 64);
      __builtin_prefetch(reinterpret_cast<const char*>(y + i) + 1024 + 64);
    }
    const Two p = load2(x + i), q = load2(y + i);
    const vf da = p.a - q.a, db = p.b - q.b;
    dot_a += p.a * q.a, dot_b += p.b * q.b;
    xx_a += p.a * p.a, xx_b += p.b * p.b;
    yy_a += q.a * q.a, yy_b += q.b * q.b;
    dd_a += da * da, dd_b += db * db;
  }
  if (full < n) {
    const Two p = load2_tail(x + full, n - full), q = load2_tail(y + full, n - full);
    const vf da = p.a - q.a, db = p.b - q.b;
    dot_a += p.a * q.a, dot_b += p.b * q.b;
    xx_a += p.a * p.a, xx_b += p.b * p.b;
    yy_a += q.a * q.a, yy_b += q.b * q.b;
    dd_a += da * da, dd_b += db * db;
  }
  out->dot = total(dot_a) + total(dot_b);
  out->xx = total(xx_a) + total(xx_b);
  out->yy = total(yy_a) + total(yy_b);
  out->dd = total(dd_a) + total(dd_b);
  constexpr double kLow = 1e-26, kHigh = 1e36;
  return out->xx > kLow && out->xx < kHigh && out->yy > kLow && out->yy < kHigh && out->dd > kLow && out->dd < kHigh;
}

// The same in fp64: nothing finite overflows or vanishes.
template <class T>
FASTMON_FN void chunk_exact(const T* x, const T* y, int64_t n, PairPart* out) {
  vd dot = {}, xx = {}, yy = {}, dd = {};
  float buffer_x[U], buffer_y[U];
  for (int64_t i = 0; i < n; i += U) {
    const Two p = i + U <= n ? load2(x + i) : load2_tail(x + i, n - i);
    const Two q = i + U <= n ? load2(y + i) : load2_tail(y + i, n - i);
    store(buffer_x, p.a), store(buffer_x + VW, p.b), store(buffer_y, q.a), store(buffer_y + VW, q.b);
    for (int j = 0; j < U; j += 8) {
      const vd a = widen(buffer_x + j), b = widen(buffer_y + j), d = a - b;
      dot += a * b, xx += a * a, yy += b * b, dd += d * d;
    }
  }
  out->dot = total(dot), out->xx = total(xx), out->yy = total(yy), out->dd = total(dd);
}

template <class T>
FASTMON_FN void task_of(const void* xs, const void* ys, int64_t begin, int64_t n, PairPart* out) {
  const T *x = static_cast<const T*>(xs) + begin, *y = static_cast<const T*>(ys) + begin;
  for (int64_t i = 0; i < n; i += kChunk) {
    const int64_t size = n - i < kChunk ? n - i : kChunk;
    PairPart part;
    if (!chunk_fast(x + i, y + i, size, &part)) chunk_exact(x + i, y + i, size, &part);
    out->merge(part);
  }
}

static void pair_task(const Span& x, const Span& y, int64_t begin, int64_t n, PairPart* out) {
  switch (x.dtype) {
    case Dtype::f32: return task_of<float>(x.data, y.data, begin, n, out);
    case Dtype::bf16: return task_of<bf16>(x.data, y.data, begin, n, out);
    case Dtype::f16: return task_of<fp16>(x.data, y.data, begin, n, out);
  }
}

static const PairTable table = {pair_task};
