// Moments of one task, for one instruction set.

// One chunk in fp32 lanes: d = (x - pivot) * 2^-k, with pivot and k from the chunk's first elements, so that neither a
// large mean nor an extreme scale costs digits. Returns false where the result cannot be trusted: something is not
// finite, deviations left the range whose powers fp32 can hold, or the pivot was far from the mean.
template <class T, bool kFour>
FASTMON_FN bool chunk_fast(const T* x, int64_t n, MomentsPart* out) {
  if (n < 4 * U) return false;
  const Two a = load2(x), b = load2(x + U);
  const float pivot = sum((a.a + a.b) + (b.a + b.b)) * (1.0f / (2 * U));
  const vf p0 = splat(pivot);
  const vf far = vmax(vmax(a.a - p0, p0 - a.a), vmax(vmax(a.b - p0, p0 - a.b), vmax(b.a - p0, p0 - b.a)));
  float spread = 0;
  for (int i = 0; i < VW; ++i) spread = far[i] > spread ? far[i] : spread;
  if (!(spread > 0)) spread = pivot < 0 ? -pivot : pivot;
  int exponent = spread > 0 ? int(float_to_bits(spread) >> 23) - 127 : 0;
  if (exponent > 126) return false;
  exponent = exponent < -126 ? -126 : exponent;
  const float scale = bits_to_float(uint32_t(127 - exponent) << 23);
  const float shift = pivot * scale;

  const vf s = splat(scale), p = splat(shift);
  vf s1a = {}, s1b = {}, s2a = {}, s2b = {}, s3a = {}, s3b = {}, s4a = {}, s4b = {};
  vf lo = a.a, hi = a.a;
  ZeroCount zeros;
  const int64_t full = n / U * U;
  for (int64_t i = 0; i < full; i += U) {
    __builtin_prefetch(reinterpret_cast<const char*>(x + i) + 2048);
    if (sizeof(T) == 4) __builtin_prefetch(reinterpret_cast<const char*>(x + i) + 2048 + 64);
    const Two v = load2(x + i);
    lo = vmin(lo, vmin(v.a, v.b));
    hi = vmax(hi, vmax(v.a, v.b));
    ZeroCount::add(zeros, v);
    const vf da = v.a * s - p, db = v.b * s - p;
    s1a += da, s1b += db;
    if (kFour) {
      const vf ea = da * da, eb = db * db;
      s2a += ea, s2b += eb;
      s3a += ea * da, s3b += eb * db;
      s4a += ea * ea, s4b += eb * eb;
    } else {
      s2a += da * da, s2b += db * db;
    }
  }
  double s1 = total(s1a) + total(s1b), s2 = total(s2a) + total(s2b);
  double s3 = kFour ? total(s3a) + total(s3b) : 0, s4 = kFour ? total(s4a) + total(s4b) : 0;
  float least = lo[0], most = hi[0];
  for (int i = 1; i < VW; ++i) {
    least = lo[i] < least ? lo[i] : least;
    most = hi[i] > most ? hi[i] : most;
  }
  int64_t zero = ZeroCount::count(zeros);
  for (int64_t i = full; i < n; ++i) {
    const float v = to_float(x[i]);
    least = v < least ? v : least;
    most = v > most ? v : most;
    zero += v == 0;
    const double d = double(v * scale - shift), e = d * d;
    s1 += d, s2 += e;
    if (kFour) s3 += e * d, s4 += e * e;
  }

  const float below = shift - least * scale, above = most * scale - shift;
  const float reach = below > above ? below : above;
  constexpr float kHigh = kFour ? 1e6f : 1e12f;
  const double mu = s1 / double(n), m2 = s2 - s1 * mu;
  const bool trusted = s2 < 1e37 && s1 < 1e37 && s1 > -1e37 && (reach == 0 || (reach < kHigh && reach > 1 / kHigh)) &&
                       s1 * mu <= 16 * m2;
  if (!trusted) return false;
  const double unit = double(bits_to_float(uint32_t(127 + exponent) << 23)), unit2 = unit * unit;
  out->n = n, out->zeros = zero, out->nonfinite = 0, out->min = least, out->max = most;
  out->mean = double(pivot) + mu * unit;
  out->m2 = m2 * unit2;
  out->m3 = kFour ? (s3 - 3 * mu * s2 + 2 * mu * mu * s1) * unit2 * unit : 0;
  out->m4 = kFour ? (s4 - 4 * mu * s3 + 6 * mu * mu * s2 - 3 * mu * mu * mu * s1) * unit2 * unit2 : 0;
  return true;
}

// The same in fp64, in two passes, for any input; also counts what is not finite.
template <class T>
FASTMON_FN void chunk_exact(const T* x, int64_t n, MomentsPart* out) {
  vd s = {};
  double rest = 0;
  const float inf = bits_to_float(0x7f800000u);
  vf lo = splat(inf), hi = splat(-inf);
  vi bad_lanes = {};
  ZeroCount zeros;
  const int64_t full = n / U * U;
  float buffer[U];
  for (int64_t i = 0; i < full; i += U) {
    const Two v = load2(x + i);
    lo = vmin(lo, vmin(v.a, v.b));
    hi = vmax(hi, vmax(v.a, v.b));
    ZeroCount::add(zeros, v);
    const vu a = reinterpret_cast<vu>(v.a) & 0x7f800000u, b = reinterpret_cast<vu>(v.b) & 0x7f800000u;
    bad_lanes -= reinterpret_cast<vi>(a == 0x7f800000u);
    bad_lanes -= reinterpret_cast<vi>(b == 0x7f800000u);
    store(buffer, v.a), store(buffer + VW, v.b);
    for (int j = 0; j < U; j += 8) s += widen(buffer + j);
  }
  int64_t zero = ZeroCount::count(zeros), bad = 0;
  float least = inf, most = -inf;
  for (int i = 0; i < VW; ++i) {
    bad += bad_lanes[i];
    least = lo[i] < least ? lo[i] : least;
    most = hi[i] > most ? hi[i] : most;
  }
  for (int64_t i = full; i < n; ++i) {
    const float f = to_float(x[i]);
    zero += f == 0;
    bad += (float_to_bits(f) & 0x7f800000u) == 0x7f800000u;
    least = f < least ? f : least;
    most = f > most ? f : most;
    rest += double(f);
  }
  out->n = n, out->zeros = zero, out->nonfinite = bad, out->min = least, out->max = most;
  if (bad) return;
  const double mean = (total(s) + rest) / double(n);
  const vd c = vd{} + mean;
  vd s1 = {}, s2 = {}, s3 = {}, s4 = {};
  double t1 = 0, t2 = 0, t3 = 0, t4 = 0;
  for (int64_t i = 0; i < full; i += U) {
    const Two v = load2(x + i);
    store(buffer, v.a), store(buffer + VW, v.b);
    for (int j = 0; j < U; j += 8) {
      const vd d = widen(buffer + j) - c, e = d * d;
      s1 += d, s2 += e, s3 += e * d, s4 += e * e;
    }
  }
  for (int64_t i = full; i < n; ++i) {
    const double d = double(to_float(x[i])) - mean, e = d * d;
    t1 += d, t2 += e, t3 += e * d, t4 += e * e;
  }
  t1 += total(s1), t2 += total(s2), t3 += total(s3), t4 += total(s4);
  const double off = t1 / double(n);  // what rounding left in the mean: nearly nothing
  out->mean = mean + off;
  out->m2 = t2 - t1 * off;
  out->m3 = t3 - 3 * off * t2;
  out->m4 = t4 - 4 * off * t3;
}

template <class T, bool kFour>
FASTMON_FN void task_of(const T* x, int64_t n, MomentsPart* out) {
  for (int64_t i = 0; i < n; i += kChunk) {
    const int64_t size = n - i < kChunk ? n - i : kChunk;
    MomentsPart part;
    if (!chunk_fast<T, kFour>(x + i, size, &part)) {
      part = MomentsPart();
      chunk_exact(x + i, size, &part);
    }
    if (i == 0) *out = part; else out->merge(part);
  }
}

static void moments_task(const Span& x, int64_t begin, int64_t n, bool four, MomentsPart* out) {
  switch (x.dtype) {
    case Dtype::f32: {
      const float* p = static_cast<const float*>(x.data) + begin;
      return four ? task_of<float, true>(p, n, out) : task_of<float, false>(p, n, out);
    }
    case Dtype::bf16: {
      const bf16* p = static_cast<const bf16*>(x.data) + begin;
      return four ? task_of<bf16, true>(p, n, out) : task_of<bf16, false>(p, n, out);
    }
    case Dtype::f16: {
      const fp16* p = static_cast<const fp16*>(x.data) + begin;
      return four ? task_of<fp16, true>(p, n, out) : task_of<fp16, false>(p, n, out);
    }
  }
}

static const MomentsTable table = {moments_task};
