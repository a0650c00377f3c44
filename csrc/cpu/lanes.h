// Vector primitives, included once per instruction set by each_isa.h; FASTMON_LANES floats to a register.

constexpr int VW = FASTMON_LANES;
constexpr int U = 2 * VW;  // elements that one load2 brings
constexpr int64_t kChunk = 512 * VW;  // elements per fp32 accumulation: 256 to a lane; stays in L1 for a second reading

typedef float vf __attribute__((vector_size(VW * 4)));
typedef float vf_mem __attribute__((vector_size(VW * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));
typedef uint32_t vu_mem __attribute__((vector_size(VW * 4), aligned(2), may_alias));

// Eight doubles for everything that must be exact; the compiler splits them where registers are narrower.
typedef double vd __attribute__((vector_size(64)));
typedef float vf8 __attribute__((vector_size(32), aligned(4), may_alias));

FASTMON_FN vf splat(float x) {
  vf v;
  for (int i = 0; i < VW; ++i) v[i] = x;
  return v;
}
FASTMON_FN vf load(const float* p) { return *reinterpret_cast<const vf_mem*>(p); }
FASTMON_FN void store(float* p, vf x) { *reinterpret_cast<vf_mem*>(p) = x; }
FASTMON_FN vd widen(const float* p) { return __builtin_convertvector(*reinterpret_cast<const vf8*>(p), vd); }

FASTMON_FN double total(vd x) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}
FASTMON_FN double total(vf x) {
  double s = 0;
  for (int i = 0; i < VW; ++i) s += double(x[i]);
  return s;
}

#if FASTMON_LEVEL == 5
// The forms with a full mask compile to the plain instructions; gcc 12 warns about its own headers on the others.
FASTMON_FN vf vmin(vf a, vf b) { return _mm512_maskz_min_ps(0xffff, a, b); }
FASTMON_FN vf vmax(vf a, vf b) { return _mm512_maskz_max_ps(0xffff, a, b); }
FASTMON_FN float sum(vf x) {
  x += __builtin_shuffle(x, vi{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
  x += __builtin_shuffle(x, vi{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
  return (x[0] + x[1]) + (x[2] + x[3]);
}
#elif FASTMON_LEVEL == 2
FASTMON_FN vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
FASTMON_FN vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
FASTMON_FN float sum(vf x) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
}
#else
FASTMON_FN vf vmin(vf a, vf b) { return a < b ? a : b; }
FASTMON_FN vf vmax(vf a, vf b) { return a > b ? a : b; }
FASTMON_FN float sum(vf x) { return (x[0] + x[1]) + (x[2] + x[3]); }
#endif

FASTMON_FN float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
FASTMON_FN uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}
FASTMON_FN float to_float(float x) { return x; }
FASTMON_FN float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
FASTMON_FN float to_float(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // Inf, NaN
  if (rest >= 0x400u) return bits_to_float(sign | ((rest << 13) + (112u << 23)));         // normal
  const float tiny = float(rest) * 5.9604644775390625e-8f;                                // subnormal: rest * 2^-24
  return sign ? -tiny : tiny;
}

struct Two { vf a, b; };

// U elements as fp32. For bf16 the even ones come in `a` and the odd ones in `b` (one instruction each); `place` says
// where an element went, for the callers to whom order matters.
FASTMON_FN Two load2(const float* p) { return {load(p), load(p + VW)}; }
FASTMON_FN Two load2(const bf16* p) {
  const vu u = *reinterpret_cast<const vu_mem*>(p);
  return {reinterpret_cast<vf>(u << 16), reinterpret_cast<vf>(u & 0xffff0000u)};
}
FASTMON_FN Two load2(const fp16* p) {
#if FASTMON_LEVEL == 5
  return {_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
          _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + VW)))};
#elif FASTMON_LEVEL == 2
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + VW)))};
#else
  Two t;
  for (int i = 0; i < VW; ++i) t.a[i] = to_float(p[i]), t.b[i] = to_float(p[VW + i]);
  return t;
#endif
}

// The last `n` < U elements of a run, zeros after them.
template <class T>
FASTMON_FN Two load2_tail(const T* p, int64_t n) {
  T buffer[U] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load2(buffer);
}

FASTMON_FN int64_t place(Dtype t, int64_t i) {
  if (t != Dtype::bf16) return i;
  const int64_t r = i % U;
  return i - r + (r & 1) * VW + r / 2;
}

// How many of the 2 * VW values are zero (of either sign).
struct ZeroCount {
#if FASTMON_LEVEL == 5
  int64_t n = 0;
  FASTMON_FN void add(ZeroCount& c, Two x) {
    const vf zero = {};
    c.n += __builtin_popcount(unsigned(_mm512_cmp_ps_mask(x.a, zero, _CMP_EQ_OQ)) << 16 |
                              unsigned(_mm512_cmp_ps_mask(x.b, zero, _CMP_EQ_OQ)));
  }
  FASTMON_FN int64_t count(const ZeroCount& c) { return c.n; }
#else
  vi n = {};
  FASTMON_FN void add(ZeroCount& c, Two x) {
    const vf zero = {};
    c.n -= reinterpret_cast<vi>(x.a == zero);
    c.n -= reinterpret_cast<vi>(x.b == zero);
  }
  FASTMON_FN int64_t count(const ZeroCount& c) {
    int64_t s = 0;
    for (int i = 0; i < VW; ++i) s += c.n[i];
    return s;
  }
#endif
};
