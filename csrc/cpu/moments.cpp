// Moments of a list of tensors in one read: fixed tasks on all threads, merged in order.
#include <vector>

#include "launch.h"
#include "moments_part.h"

namespace fastmon {
struct MomentsTable { void (*task)(const Span& x, int64_t begin, int64_t n, bool four, MomentsPart* out); };
}  // namespace fastmon

#define FASTMON_BODY "moments_body.h"
#include "each_isa.h"
#include "span_tasks.h"

namespace fastmon {

void moments(Isa isa, const Span* xs, int64_t n, int64_t* counts, float* stats, int64_t order) {
  const MomentsTable& kernels = pick<MomentsTable>(isa);
  const bool four = order == 4;
  const SpanTasks plan(xs, n);
  std::vector<MomentsPart> parts(plan.tasks.size());
  plan.run([&](int64_t t) {
    const SpanTask& task = plan.tasks[t];
    kernels.task(xs[task.tensor], task.begin, task.size, four, &parts[t]);
  });
  const float nan = std::numeric_limits<float>::quiet_NaN();
  size_t t = 0;
  for (int64_t i = 0; i < n; ++i) {
    MomentsPart all;
    for (; t < parts.size() && plan.tasks[t].tensor == i; ++t) all.merge(parts[t]);
    counts[i] = xs[i].numel, counts[n + i] = all.zeros, counts[2 * n + i] = all.nonfinite;
    const double sumsq = all.m2 + double(xs[i].numel) * all.mean * all.mean;
    const float absmax = xs[i].numel == 0 ? 0 : std::fmax(std::fabs(all.min), std::fabs(all.max));
    const float row[9] = {float(all.mean), float(all.m2), float(sumsq),  all.min, all.max, absmax,
                          float(std::sqrt(sumsq)), float(all.m3), float(all.m4)};
    for (int64_t k = 0; k < (four ? 9 : 7); ++k) stats[k * n + i] = all.nonfinite ? nan : row[k];
  }
}

}  // namespace fastmon
