// The raw launchers of fastmon_C on the CPU: tensors in, pointers out, no maths. LibTorch stable ABI only, so that one
// build serves several versions of torch and of Python. The callers have validated their inputs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/launch.h"

namespace {

using fastmon::Dtype;
using fastmon::Isa;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512"};

Isa best_isa() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("popcnt"))
    return Isa::avx2;
#endif
  return Isa::portable;
}

// The best instruction set of this machine, or the lower one that FASTMON_CPU_ISA names (read at the first call).
Isa chosen_isa() {
  static const Isa isa = [] {
    const Isa best = best_isa();
    const char* wanted = std::getenv("FASTMON_CPU_ISA");
    if (wanted == nullptr || *wanted == 0) return best;
    for (int i = 0; i <= int(best); ++i)
      if (std::string(wanted) == kIsaNames[i]) return Isa(i);
    STD_TORCH_CHECK(false, "FASTMON_CPU_ISA is '", wanted, "'; wanted portable, avx2 or avx512, and at most ",
                    kIsaNames[int(best)], " on this machine");
  }();
  return isa;
}

std::string cpu_isa() { return kIsaNames[int(chosen_isa())]; }

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, "the CPU kernels take float32, bfloat16 or float16 tensors");
  }
}

std::vector<fastmon::Span> spans_of(const std::vector<Tensor>& xs) {
  std::vector<fastmon::Span> spans;
  spans.reserve(xs.size());
  for (const Tensor& x : xs) spans.push_back({x.const_data_ptr(), dtype_of(x), x.numel()});
  return spans;
}

std::vector<fastmon::Matrix> matrices_of(const std::vector<Tensor>& ws) {
  std::vector<fastmon::Matrix> matrices;
  matrices.reserve(ws.size());
  for (const Tensor& w : ws) {
    const int64_t m = w.size(0), n = w.size(1);
    STD_TORCH_CHECK(n <= 1 || w.stride(1) == 1, "matrices must be row-major, got a column stride of ", w.stride(1));
    matrices.push_back({w.const_data_ptr(), dtype_of(w), m, n, m > 1 ? w.stride(0) : n});
  }
  return matrices;
}

// Vectors per matrix, from the state's length.
int64_t block_of(const std::vector<fastmon::Matrix>& ws, const Tensor& state) {
  int64_t row = 0;
  const int64_t header = fastmon::kPad * int64_t(ws.size());
  for (const auto& w : ws) row += fastmon::padded(w.n);
  const int64_t block = row == 0 ? 1 : (state.numel() - header) / row;
  STD_TORCH_CHECK(block >= 1 && block <= fastmon::kMaxBlock && header + (row ? block * row : 0) <= state.numel(),
                  "a state of ", state.numel(), " floats does not fit ", ws.size(), " matrices");
  return block;
}

float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

void moments(std::vector<Tensor> xs, Tensor counts, Tensor stats, int64_t order) {
  const auto spans = spans_of(xs);
  fastmon::moments(chosen_isa(), spans.data(), int64_t(spans.size()), static_cast<int64_t*>(counts.mutable_data_ptr()),
                   floats(stats), order);
}

void pair_moments(std::vector<Tensor> xs, std::vector<Tensor> ys, Tensor out) {
  const auto a = spans_of(xs), b = spans_of(ys);
  fastmon::pair_moments(chosen_isa(), a.data(), b.data(), int64_t(a.size()), floats(out));
}

void gram_matvec(std::vector<Tensor> ws, Tensor state, Tensor z, Tensor yy, Tensor fro2) {
  const auto matrices = matrices_of(ws);
  fastmon::gram_matvec(chosen_isa(), matrices.data(), int64_t(matrices.size()),
                       static_cast<const float*>(state.const_data_ptr()), block_of(matrices, state), floats(z), floats(yy),
                       floats(fro2));
}

void spectral_norm(std::vector<Tensor> ws, Tensor state, Tensor out, int64_t iters) {
  STD_TORCH_CHECK(iters >= 1, "iters must be at least 1, got ", iters);
  const auto matrices = matrices_of(ws);
  fastmon::spectral_norm(chosen_isa(), matrices.data(), int64_t(matrices.size()), floats(state),
                         block_of(matrices, state), floats(out), iters);
}

void lanczos(std::vector<Tensor> ws, Tensor state, Tensor out, int64_t iters) {
  STD_TORCH_CHECK(iters >= 1, "iters must be at least 1, got ", iters);
  const auto matrices = matrices_of(ws);
  STD_TORCH_CHECK(block_of(matrices, state) == 1, "lanczos wants a state of one vector per matrix");
  fastmon::lanczos(chosen_isa(), matrices.data(), int64_t(matrices.size()), floats(state), floats(out), iters);
}

}  // namespace

STABLE_TORCH_LIBRARY(fastmon_C, m) {
  m.def("cpu_isa() -> str");
  m.def("moments(Tensor[] xs, Tensor(a!) counts, Tensor(b!) stats, int order) -> ()");
  m.def("pair_moments(Tensor[] xs, Tensor[] ys, Tensor(a!) out) -> ()");
  m.def("gram_matvec(Tensor[] ws, Tensor state, Tensor(a!) z, Tensor(b!) yy, Tensor(c!) fro2) -> ()");
  m.def("spectral_norm(Tensor[] ws, Tensor(a!) state, Tensor(b!) out, int iters) -> ()");
  m.def("lanczos(Tensor[] ws, Tensor(a!) state, Tensor(b!) out, int iters) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastmon_C, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

STABLE_TORCH_LIBRARY_IMPL(fastmon_C, CPU, m) {
  m.impl("moments", TORCH_BOX(&moments));
  m.impl("pair_moments", TORCH_BOX(&pair_moments));
  m.impl("gram_matvec", TORCH_BOX(&gram_matvec));
  m.impl("spectral_norm", TORCH_BOX(&spectral_norm));
  m.impl("lanczos", TORCH_BOX(&lanczos));
}
