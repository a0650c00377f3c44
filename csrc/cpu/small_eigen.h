// Eigenproblems of a handful of unknowns, in fp64: cyclic Jacobi and the top of a symmetric tridiagonal matrix.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

namespace fastmon {

// a (n, n) symmetric -> eigenvalues on its diagonal, eigenvectors in the columns of q; order: indices, largest first.
inline void jacobi(int n, double* a, double* q, int* order) {
  for (int i = 0; i < n * n; ++i) q[i] = i % (n + 1) == 0;
  for (int sweep = 0; sweep < 30; ++sweep) {
    double off = 0, diagonal = 0;
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j) (i == j ? diagonal : off) += a[i * n + j] * a[i * n + j];
    if (off <= 1e-30 * diagonal) break;
    for (int p = 0; p < n; ++p) {
      for (int r = p + 1; r < n; ++r) {
        const double apr = a[p * n + r];
        if (apr == 0) continue;
        const double tau = (a[r * n + r] - a[p * n + p]) / (2 * apr);
        const double t = (tau >= 0 ? 1 : -1) / (std::fabs(tau) + std::sqrt(1 + tau * tau));
        const double c = 1 / std::sqrt(1 + t * t), s = t * c;
        for (int i = 0; i < n; ++i) {
          const double x = a[i * n + p], y = a[i * n + r];
          a[i * n + p] = c * x - s * y, a[i * n + r] = s * x + c * y;
        }
        for (int i = 0; i < n; ++i) {
          const double x = a[p * n + i], y = a[r * n + i];
          a[p * n + i] = c * x - s * y, a[r * n + i] = s * x + c * y;
        }
        for (int i = 0; i < n; ++i) {
          const double x = q[i * n + p], y = q[i * n + r];
          q[i * n + p] = c * x - s * y, q[i * n + r] = s * x + c * y;
        }
      }
    }
  }
  for (int i = 0; i < n; ++i) {
    int at = i;
    for (; at > 0 && a[order[at - 1] * (n + 1)] < a[i * (n + 1)]; --at) order[at] = order[at - 1];
    order[at] = i;
  }
}

// Largest eigenvalue of the tridiagonal matrix with diagonal `a` and off-diagonal `b` (n - 1 used): bisection on the
// number of eigenvalues above x, which is a Sturm count. `s`: its unit eigenvector, by inverse iteration.
inline double top_of_tridiagonal(int n, const double* a, const double* b, double* s) {
  double low = a[0], high = a[0];
  for (int i = 0; i < n; ++i) {
    if (!std::isfinite(a[i])) return a[i] - a[i];
    const double radius = (i ? std::fabs(b[i - 1]) : 0) + (i + 1 < n ? std::fabs(b[i]) : 0);
    low = std::max(low, a[i]), high = std::max(high, a[i] + radius);
  }
  auto any_above = [&](double x) {  // a positive pivot of T - x
    double d = 1;
    for (int i = 0; i < n; ++i) {
      d = a[i] - x - (i ? b[i - 1] * b[i - 1] / d : 0);
      if (d > 0) return true;
      if (d == 0) d = -1e-300;
    }
    return false;
  };
  for (int i = 0; i < 200; ++i) {
    const double mid = low + (high - low) / 2;
    if (!(mid > low && mid < high)) break;
    (any_above(mid) ? low : high) = mid;
  }
  const double theta = high;

  // (T - theta) = L U with partial pivoting: rows of U hold up to three entries.
  std::vector<double> u0(n), u1(n), u2(n), l(n), x(n, 1.0);
  std::vector<char> swapped(n);
  const double tiny = 1e-16 * std::max(std::fabs(low), std::fabs(high)) + 1e-300;
  double d0 = a[0] - theta, d1 = n > 1 ? b[0] : 0;
  for (int i = 0; i + 1 < n; ++i) {
    const double e0 = b[i], e1 = a[i + 1] - theta, e2 = i + 2 < n ? b[i + 1] : 0;
    swapped[i] = std::fabs(e0) > std::fabs(d0);
    if (swapped[i]) {
      u0[i] = e0, u1[i] = e1, u2[i] = e2;
      l[i] = d0 / e0;
      d0 = d1 - l[i] * e1, d1 = -l[i] * e2;
    } else {
      u0[i] = d0 == 0 ? tiny : d0, u1[i] = d1, u2[i] = 0;
      l[i] = e0 / u0[i];
      d0 = e1 - l[i] * d1, d1 = e2;
    }
  }
  u0[n - 1] = std::fabs(d0) < tiny ? tiny : d0;
  for (int round = 0; round < 3; ++round) {
    if (round > 0) {
      for (int i = 0; i + 1 < n; ++i) {
        if (swapped[i]) std::swap(x[i], x[i + 1]);
        x[i + 1] -= l[i] * x[i];
      }
    }
    for (int i = n - 1; i >= 0; --i) {
      double r = x[i];
      if (i + 1 < n) r -= u1[i] * x[i + 1];
      if (i + 2 < n) r -= u2[i] * x[i + 2];
      x[i] = r / u0[i];
    }
    double most = 0, norm = 0;
    for (double y : x) most = std::max(most, std::fabs(y));
    for (double& y : x) y /= most, norm += y * y;
    for (double& y : x) y /= std::sqrt(norm);
  }
  for (int i = 0; i < n; ++i) s[i] = x[i];
  return theta;
}

}  // namespace fastmon
