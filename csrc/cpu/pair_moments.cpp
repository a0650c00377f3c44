// <x, y>, |x|^2, |y|^2 and |x - y|^2 of two lists of tensors in one read of both: fixed tasks, merged in order.
#include <vector>

#include "launch.h"
#include "moments_part.h"

namespace fastmon {
struct PairTable { void (*task)(const Span& x, const Span& y, int64_t begin, int64_t n, PairPart* out); };
}  // namespace fastmon

#define FASTMON_BODY "pair_moments_body.h"
#include "each_isa.h"
#include "span_tasks.h"

namespace fastmon {

void pair_moments(Isa isa, const Span* xs, const Span* ys, int64_t n, float* out) {
  const PairTable& kernels = pick<PairTable>(isa);
  const SpanTasks plan(xs, n);
  std::vector<PairPart> parts(plan.tasks.size());
  plan.run([&](int64_t t) {
    const SpanTask& task = plan.tasks[t];
    kernels.task(xs[task.tensor], ys[task.tensor], task.begin, task.size, &parts[t]);
  });
  const float nan = std::numeric_limits<float>::quiet_NaN();
  size_t t = 0;
  for (int64_t i = 0; i < n; ++i) {
    PairPart all;
    for (; t < parts.size() && plan.tasks[t].tensor == i; ++t) all.merge(parts[t]);
    // Sums of squares of finite fp32 values stay finite in fp64, so this tells whether an input was not.
    const bool finite = std::isfinite(all.xx) && std::isfinite(all.yy);
    const double x = std::sqrt(all.xx), y = std::sqrt(all.yy);
    const double cosine = x > 0 && y > 0 ? std::fmin(1.0, std::fmax(-1.0, all.dot / x / y)) : nan;
    const float row[8] = {float(all.dot), float(all.xx), float(all.yy),            float(all.dd),
                          float(x),       float(y),      float(std::sqrt(all.dd)), float(cosine)};
    for (int64_t k = 0; k < 8; ++k) out[k * n + i] = finite ? row[k] : nan;
  }
}

}  // namespace fastmon
