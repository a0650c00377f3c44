// Partial results of the reductions, in fp64, and how two of them merge.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace fastmon {

// Central moments of n elements: m_k = sum (x - mean)^k.
struct MomentsPart {
  int64_t n = 0, zeros = 0, nonfinite = 0;
  double mean = 0, m2 = 0, m3 = 0, m4 = 0;
  float min = std::numeric_limits<float>::infinity(), max = -std::numeric_limits<float>::infinity();

  MomentsPart() {}

  // Chan, Golub and LeVeque 1979 (m3, m4: Pebay 2008). A non-finite part leaves the sums meaningless, which the count says.
  void merge(const MomentsPart& o) {
    zeros += o.zeros, nonfinite += o.nonfinite;
    if (o.min < min) min = o.min;
    if (o.max > max) max = o.max;
    if (o.n == 0) return;
    const double a = double(n), b = double(o.n), s = a + b, d = o.mean - mean;
    const double ra = a / s, rb = b / s, d2 = d * d;
    m4 += o.m4 + d2 * d2 * a * rb * (ra * ra - ra * rb + rb * rb) + 6 * d2 * (ra * ra * o.m2 + rb * rb * m2) +
          4 * d * (ra * o.m3 - rb * m3);
    m3 += o.m3 + d2 * d * a * rb * (ra - rb) + 3 * d * (ra * o.m2 - rb * m2);
    m2 += o.m2 + d2 * a * rb;
    mean += d * rb;
    n += o.n;
  }
};

struct PairPart {
  double dot = 0, xx = 0, yy = 0, dd = 0;
  PairPart() {}
  void merge(const PairPart& o) { dot += o.dot, xx += o.xx, yy += o.yy, dd += o.dd; }
};

constexpr int64_t kTask = 65536;         // elements per task
constexpr int64_t kSerial = 2 * kTask;   // a shorter list stays on the calling thread: waking others costs as much

}  // namespace fastmon
