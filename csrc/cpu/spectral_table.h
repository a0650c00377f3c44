// What one instruction set offers to the spectral launchers.
#pragma once

#include "launch.h"

namespace fastmon {

// How W' = W * 2^-e is formed: elements are multiplied by `load` (1 unless e is extreme), the products with v by `weight`
// before they meet the rows again, sums of squares by `square`.
struct Scale {
  float load;
  double weight, square;
};

struct SpectralTable {
  // Rows [row, row + rows): z = W'^T (W' V), yy = (W' V)^T (W' V), fro2 = |W'|_F^2. Rows of v and z are `wide` floats.
  void (*sweep)(const Matrix& m, int64_t row, int64_t rows, Scale s, const float* v, int64_t block, int64_t wide,
                float* z, double* yy, double* fro2);
  float (*absmax)(const Matrix& m);
  void (*arrange)(Dtype t, const float* x, int64_t n, int64_t wide, float* out);
  void (*restore)(Dtype t, const float* x, int64_t n, float* out);
  void (*gather)(float* z, int64_t parts, int64_t size);
  double (*dot)(const float* x, const float* y, int64_t wide);
  double (*gap2)(double a, const float* x, double b, const float* y, int64_t wide);
  void (*blend)(double a, const float* x, double b, float* y, int64_t wide);
};

}  // namespace fastmon
