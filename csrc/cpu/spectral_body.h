// Gram mat-vec of one task and the vector arithmetic around it, for one instruction set.

// Each step takes the dot products of the next rows with v while it adds the previous rows, still in L1 or L2, to z:
// memory is read at an even pace and every row once. Two rows of fp32 and four of 16 bits keep both sets and v and z in
// L1 for usual widths. The rows four further on are prefetched into L2 (hint 2): into L1 they would push out the rows in
// use. Measured on Zen 4: L1 as target costs 1.3x in fp32 and 1.7x in bf16, four rows of fp32 1.15x.
template <class T>
constexpr int kRows = sizeof(T) == 4 ? 2 : 4;
constexpr int kAhead = 4;

// One step of R rows for one vector: y = dot products of the rows at `next` with v, z += the rows at `last` times c; the
// rows at `ahead` are fetched into the cache meanwhile. n is a multiple of U.
template <class T, int R, bool kScaled>
static __attribute__((noinline)) void whole_step(const T* next, const T* last, const T* ahead, int64_t stride, int64_t n,
                                                 float scale, const float* v, const float* c, float* z, float* y,
                                                 vd* fro2) {
  vf acc[R], f0 = {}, f1 = {}, w[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) acc[r] = vf{}, w[r] = splat(c[r]);
  for (int64_t j = 0; j < n; j += U) {
    const vf v0 = load(v + j), v1 = load(v + j + VW);
    vf z0 = load(z + j), z1 = load(z + j + VW);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(ahead + r * stride + j, 0, 2);
      if (sizeof(T) * U > 64) __builtin_prefetch(ahead + r * stride + j + VW, 0, 2);
      Two a = load2(next + r * stride + j), b = load2(last + r * stride + j);
      if (kScaled) a.a *= scale, a.b *= scale, b.a *= scale, b.b *= scale;
      acc[r] += a.a * v0;
      f0 += a.a * a.a;
      z0 += b.a * w[r];
      acc[r] += a.b * v1;
      f1 += a.b * a.b;
      z1 += b.b * w[r];
    }
    store(z + j, z0), store(z + j + VW, z1);
  }
  for (int r = 0; r < R; ++r) y[r] = sum(acc[r]);
  float squares[U];
  store(squares, f0), store(squares + VW, f1);
  for (int j = 0; j < U; j += 8) *fro2 += widen(squares + j);
}

// The same for any n: columns beyond the last multiple of U are copied beside zeros.
template <class T, int R, bool kScaled>
FASTMON_FN void step(const T* next, const T* last, const T* ahead, int64_t stride, int64_t n, float scale, const float* v,
                     const float* c, float* z, float* y, vd* fro2) {
  const int64_t full = n / U * U;
  whole_step<T, R, kScaled>(next, last, ahead, stride, full, scale, v, c, z, y, fro2);
  if (full == n) return;
  T next_end[R * U] = {}, last_end[R * U] = {};
  float y_end[R];
  for (int r = 0; r < R; ++r) {
    for (int64_t j = full; j < n; ++j) {
      next_end[r * U + j - full] = next[r * stride + j];
      last_end[r * U + j - full] = last[r * stride + j];
    }
  }
  whole_step<T, R, kScaled>(next_end, last_end, next_end, U, U, scale, v + full, c, z + full, y_end, fro2);
  for (int r = 0; r < R; ++r) y[r] += y_end[r];
}

template <class T, bool kScaled>
FASTMON_FN void sweep_one(const T* w, int64_t rows, int64_t stride, int64_t n, Scale s, const float* v, float* z,
                          double* yy, double* fro2) {
  constexpr int R = kRows<T>;
  float y[R], c[R] = {}, none[R] = {};
  vd fro = {}, ignored = {};
  double norm = 0;
  const int64_t steps = rows / R, hop = R * stride;
  for (int64_t b = 0; b < steps; ++b) {
    const T* next = w + b * hop;
    const T* ahead = b * R + kAhead + R <= rows ? next + kAhead * stride : next;
    step<T, R, kScaled>(next, b ? next - hop : next, ahead, stride, n, s.load, v, c, z, y, &fro);
    for (int r = 0; r < R; ++r) {
      norm += double(y[r]) * double(y[r]);
      c[r] = float(double(y[r]) * s.weight);
    }
  }
  if (steps > 0) {
    const T* last = w + (steps - 1) * hop;
    step<T, R, kScaled>(last, last, last, stride, n, s.load, v, c, z, y, &ignored);
  }
  for (int64_t r = steps * R; r < rows; ++r) {
    const T* row = w + r * stride;
    step<T, 1, kScaled>(row, row, row, stride, n, s.load, v, none, z, y, &fro);
    norm += double(y[0]) * double(y[0]);
    c[0] = float(double(y[0]) * s.weight);
    step<T, 1, kScaled>(row, row, row, stride, n, s.load, v, c, z, y, &ignored);
  }
  *yy = norm * s.square;
  *fro2 = total(fro) * s.square;
}

template <class T, bool kScaled>
FASTMON_FN Two load_row(const T* p, int64_t left, float scale) {
  Two w = left >= U ? load2(p) : load2_tail(p, left);
  if (kScaled) w.a *= scale, w.b *= scale;
  return w;
}

// R rows against K vectors, y[r * block + k]; then the same rows onto K rows of z. Rows of v and z are `wide` apart.
template <class T, int R, int K, bool kScaled>
static __attribute__((noinline)) void dots(const T* w, const T* ahead, int64_t stride, int64_t n, int64_t wide, float scale,
                                           const float* v, int64_t block, float* y, double* fro2) {
  vf acc[R][K] = {}, f0 = {}, f1 = {};
  for (int64_t j = 0; j < n; j += U) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if (fro2) {
        __builtin_prefetch(ahead + r * stride + j, 0, 2);
        if (sizeof(T) * U > 64) __builtin_prefetch(ahead + r * stride + j + VW, 0, 2);
      }
      const Two x = load_row<T, kScaled>(w + r * stride + j, n - j, scale);
      if (fro2) f0 += x.a * x.a, f1 += x.b * x.b;
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        acc[r][k] += x.a * load(v + k * wide + j);
        acc[r][k] += x.b * load(v + k * wide + j + VW);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < K; ++k) y[r * block + k] = sum(acc[r][k]);
  if (fro2) *fro2 += total(f0) + total(f1);
}

template <class T, int R, int K, bool kScaled>
static __attribute__((noinline)) void adds(const T* w, int64_t stride, int64_t n, int64_t wide, float scale,
                                           const float* c, int64_t block, float* z) {
  vf weight[R][K];
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < K; ++k) weight[r][k] = splat(c[r * block + k]);
  for (int64_t j = 0; j < n; j += U) {
    Two x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = load_row<T, kScaled>(w + r * stride + j, n - j, scale);
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      vf z0 = load(z + k * wide + j), z1 = load(z + k * wide + j + VW);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) z0 += x[r].a * weight[r][k], z1 += x[r].b * weight[r][k];
      store(z + k * wide + j, z0), store(z + k * wide + j + VW, z1);
    }
  }
}

// R rows against all vectors, four at a time and then one by one.
template <class T, int R, bool kScaled>
static void rows_many(const T* w, const T* ahead, int64_t stride, int64_t n, int64_t wide, Scale s, const float* v,
                      int64_t block, float* z, double* yy, double* fro2) {
  float y[R * kMaxBlock], c[R * kMaxBlock];
  for (int64_t k = 0; k < block;) {
    double* fro = k == 0 ? fro2 : nullptr;
    const bool four = block - k >= 4;
    if (four) dots<T, R, 4, kScaled>(w, ahead, stride, n, wide, s.load, v + k * wide, block, y + k, fro);
    else dots<T, R, 1, kScaled>(w, ahead, stride, n, wide, s.load, v + k * wide, block, y + k, fro);
    k += four ? 4 : 1;
  }
  for (int r = 0; r < R; ++r) {
    for (int64_t k = 0; k < block; ++k) {
      c[r * block + k] = float(double(y[r * block + k]) * s.weight);
      for (int64_t l = 0; l < block; ++l) yy[k * block + l] += double(y[r * block + k]) * double(y[r * block + l]);
    }
  }
  for (int64_t k = 0; k < block;) {
    const bool four = block - k >= 4;
    if (four) adds<T, R, 4, kScaled>(w, stride, n, wide, s.load, c + k, block, z + k * wide);
    else adds<T, R, 1, kScaled>(w, stride, n, wide, s.load, c + k, block, z + k * wide);
    k += four ? 4 : 1;
  }
}

template <class T, bool kScaled>
static void sweep_many(const T* w, int64_t rows, int64_t stride, int64_t n, int64_t wide, Scale s, const float* v,
                       int64_t block, float* z, double* yy, double* fro2) {
  double fro = 0;
  for (int64_t k = 0; k < block * block; ++k) yy[k] = 0;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const T* at = w + r * stride;
    rows_many<T, 4, kScaled>(at, r + 8 <= rows ? at + 4 * stride : at, stride, n, wide, s, v, block, z, yy, &fro);
  }
  for (; r < rows; ++r) {
    const T* at = w + r * stride;
    rows_many<T, 1, kScaled>(at, at, stride, n, wide, s, v, block, z, yy, &fro);
  }
  for (int64_t k = 0; k < block * block; ++k) yy[k] *= s.square;
  *fro2 = fro * s.square;
}

template <class T>
static void sweep_of(const Matrix& m, int64_t row, int64_t rows, Scale s, const float* v, int64_t block, int64_t wide,
                     float* z, double* yy, double* fro2) {
  const T* w = static_cast<const T*>(m.data) + row * m.stride;
  __builtin_memset(z, 0, size_t(block * wide) * sizeof(float));
  if (block == 1 && s.load == 1) sweep_one<T, false>(w, rows, m.stride, m.n, s, v, z, yy, fro2);
  else if (block == 1) sweep_one<T, true>(w, rows, m.stride, m.n, s, v, z, yy, fro2);
  else if (s.load == 1) sweep_many<T, false>(w, rows, m.stride, m.n, wide, s, v, block, z, yy, fro2);
  else sweep_many<T, true>(w, rows, m.stride, m.n, wide, s, v, block, z, yy, fro2);
}

static void sweep(const Matrix& m, int64_t row, int64_t rows, Scale s, const float* v, int64_t block, int64_t wide,
                  float* z, double* yy, double* fro2) {
  switch (m.dtype) {
    case Dtype::f32: return sweep_of<float>(m, row, rows, s, v, block, wide, z, yy, fro2);
    case Dtype::bf16: return sweep_of<bf16>(m, row, rows, s, v, block, wide, z, yy, fro2);
    case Dtype::f16: return sweep_of<fp16>(m, row, rows, s, v, block, wide, z, yy, fro2);
  }
}

// Largest |w| of a matrix; infinity when an element is not finite.
template <class T>
static float absmax_of(const Matrix& m) {
  uint32_t most = 0;
  for (int64_t i = 0; i < m.m; ++i) {
    const T* row = static_cast<const T*>(m.data) + i * m.stride;
    for (int64_t j = 0; j < m.n; ++j) {
      const uint32_t bits = float_to_bits(to_float(row[j])) & 0x7fffffffu;
      most = bits > most ? bits : most;
    }
  }
  return bits_to_float(most < 0x7f800000u ? most : 0x7f800000u);
}
static float absmax(const Matrix& m) {
  switch (m.dtype) {
    case Dtype::f32: return absmax_of<float>(m);
    case Dtype::bf16: return absmax_of<bf16>(m);
    case Dtype::f16: return absmax_of<fp16>(m);
  }
  return 0;
}

// Vectors in working order (see load2), `wide` floats with zeros at the end.
static void arrange(Dtype t, const float* x, int64_t n, int64_t wide, float* out) {
  const int64_t full = n / U * U;
  if (t == Dtype::bf16) {
    for (int64_t i = 0; i < full; i += U)
      for (int j = 0; j < VW; ++j) out[i + j] = x[i + 2 * j], out[i + VW + j] = x[i + 2 * j + 1];
  } else {
    __builtin_memcpy(out, x, size_t(full) * sizeof(float));
  }
  for (int64_t i = full; i < wide; ++i) out[i] = 0;
  for (int64_t i = full; i < n; ++i) out[place(t, i)] = x[i];
}
static void restore(Dtype t, const float* x, int64_t n, float* out) {
  const int64_t full = n / U * U;
  if (t == Dtype::bf16) {
    for (int64_t i = 0; i < full; i += U)
      for (int j = 0; j < VW; ++j) out[i + 2 * j] = x[i + j], out[i + 2 * j + 1] = x[i + VW + j];
  } else {
    __builtin_memcpy(out, x, size_t(full) * sizeof(float));
  }
  for (int64_t i = full; i < n; ++i) out[i] = x[place(t, i)];
}

// The sum of `parts` vectors that follow each other, written over the first.
static void gather(float* z, int64_t parts, int64_t size) {
  if (parts == 1) return;
  for (int64_t j = 0; j < size; j += 8) {
    vd s = widen(z + j);
    for (int64_t p = 1; p < parts; ++p) s += widen(z + p * size + j);
    *reinterpret_cast<vf8*>(z + j) = __builtin_convertvector(s, vf8);
  }
}
static double dot(const float* x, const float* y, int64_t wide) {
  vd a = {}, b = {};
  for (int64_t j = 0; j < wide; j += 16) {
    a += widen(x + j) * widen(y + j);
    b += widen(x + j + 8) * widen(y + j + 8);
  }
  return total(a + b);
}
// |a x - b y|^2
static double gap2(double a, const float* x, double b, const float* y, int64_t wide) {
  vd s = {}, t = {};
  for (int64_t j = 0; j < wide; j += 16) {
    const vd d = a * widen(x + j) - b * widen(y + j), e = a * widen(x + j + 8) - b * widen(y + j + 8);
    s += d * d, t += e * e;
  }
  return total(s + t);
}
// y <- a x + b y; with b = 0 what y held does not matter
static void blend(double a, const float* x, double b, float* y, int64_t wide) {
  for (int64_t j = 0; j < wide; j += 8) {
    const vd old = b == 0 ? vd{} : b * widen(y + j);
    *reinterpret_cast<vf8*>(y + j) = __builtin_convertvector(a * widen(x + j) + old, vf8);
  }
}

static const SpectralTable table = {sweep, absmax, arrange, restore, gather, dot, gap2, blend};
