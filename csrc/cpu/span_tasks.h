// A list of dense runs cut into tasks of at most kTask elements; tiny tensors share a turn, so that a list of thousands
// of biases does not spend its time on taking turns.
#pragma once

#include <vector>

#include "launch.h"
#include "moments_part.h"

namespace fastmon {

struct SpanTask { int64_t tensor, begin, size; };

struct SpanTasks {
  std::vector<SpanTask> tasks;
  std::vector<int64_t> turns;  // task numbers where a turn starts, then the number of tasks
  int64_t elements = 0;

  SpanTasks(const Span* xs, int64_t n) {
    for (int64_t i = 0; i < n; ++i) elements += xs[i].numel;
    tasks.reserve(elements / kTask + n);
    int64_t held = kTask;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t begin = 0; begin < xs[i].numel; begin += kTask) {
        const int64_t size = xs[i].numel - begin < kTask ? xs[i].numel - begin : kTask;
        if (held + size > kTask) turns.push_back(int64_t(tasks.size())), held = 0;
        held += size;
        tasks.push_back({i, begin, size});
      }
    }
    turns.push_back(int64_t(tasks.size()));
  }

  template <class F>
  void run(const F& f) const {
    run_tasks(int64_t(turns.size()) - 1, elements < kSerial, [&](int64_t turn) {
      for (int64_t t = turns[turn]; t < turns[turn + 1]; ++t) f(t);
    });
  }
};

}  // namespace fastmon
