// What the CPU kernels share: plain descriptions of their inputs, the instruction sets, and the task loop.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdint>
#include <exception>

namespace fastmon {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

enum class Dtype { f32, bf16, f16 };

// Instruction sets a body is compiled for, lowest first.
enum class Isa { portable, avx2, avx512 };

// A dense run of `numel` elements: order inside a tensor does not matter to a reduction.
struct Span { const void* data; Dtype dtype; int64_t numel; };

// A row-major matrix (m, n): columns are adjacent, rows are `stride` elements apart.
struct Matrix { const void* data; Dtype dtype; int64_t m, n, stride; };

constexpr int64_t element_size(Dtype t) { return t == Dtype::f32 ? 4 : 2; }

// Floats per row of a spectral state are padded to this many (64 bytes); a matrix's segment starts with one such header.
constexpr int64_t kPad = 16;
constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }
constexpr int64_t kMaxBlock = 16;

// counts: int64 (3, n); stats: float (order == 4 ? 9 : 7, n).
void moments(Isa isa, const Span* xs, int64_t n, int64_t* counts, float* stats, int64_t order);

// out: float (8, n).
void pair_moments(Isa isa, const Span* xs, const Span* ys, int64_t n, float* out);

// z: per matrix `block` rows of padded(n) floats; yy: (count, block, block); fro2: (count).
void gram_matvec(Isa isa, const Matrix* ws, int64_t count, const float* state, int64_t block, float* z, float* yy,
                 float* fro2);

// out: (3, count): sigma, residual, fro.
void spectral_norm(Isa isa, const Matrix* ws, int64_t count, float* state, int64_t block, float* out, int64_t iters);
void lanczos(Isa isa, const Matrix* ws, int64_t count, float* state, float* out, int64_t iters);

// Runs f(0) ... f(tasks - 1), each once, on torch's threads. Threads take the next free task, so a slow core delays the
// others by one task at most; results must depend on the task alone, never on who ran it. No exception (a task that is out
// of memory) leaves the callback, which torch's C interface calls: the first one is thrown again here, and tasks that
// nobody has begun by then are left undone.
template <class F>
void run_tasks(int64_t tasks, bool serial, const F& f) {
  uint32_t threads = 1;
  if (!serial && tasks > 1) STD_TORCH_CHECK(torch_get_num_threads(&threads) == AOTI_TORCH_SUCCESS, "no thread count");
  if (threads <= 1) {
    for (int64_t t = 0; t < tasks; ++t) f(t);
    return;
  }
  struct Shared {
    const F& f;
    const int64_t tasks;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;  // written by the thread that set `failed`, read after all are done
  } shared{f, tasks};
  auto loop = [](int64_t, int64_t, void* context) noexcept {
    auto* s = static_cast<Shared*>(context);
    try {
      for (int64_t t; (t = s->next.fetch_add(1, std::memory_order_relaxed)) < s->tasks;) s->f(t);
    } catch (...) {
      s->next.store(s->tasks, std::memory_order_relaxed);
      if (!s->failed.exchange(true)) s->error = std::current_exception();
    }
  };
  STD_TORCH_CHECK(torch_parallel_for(0, threads, 1, loop, &shared) == AOTI_TORCH_SUCCESS, "torch_parallel_for failed");
  if (shared.error) std::rethrow_exception(shared.error);
}

}  // namespace fastmon
