// Spectral norms of a list of matrices: every matrix is read once per iteration.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "spectral_table.h"

#define FASTMON_BODY "spectral_body.h"
#include "each_isa.h"
#include "small_eigen.h"

namespace fastmon {
namespace {

constexpr int64_t kTaskElements = int64_t(1) << 19;  // matrix elements per task
constexpr int64_t kMostTasks = 32;                    // per matrix: each holds a partial result of `block` vectors
constexpr int64_t kSerialElements = int64_t(1) << 17;  // a shorter list stays on the calling thread
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Free { void operator()(float* p) const { std::free(p); } };
using Floats = std::unique_ptr<float, Free>;

Floats allocate(int64_t floats) {
  const size_t bytes = (size_t(floats) * sizeof(float) + 63) / 64 * 64;
  float* p = static_cast<float*>(std::aligned_alloc(64, bytes ? bytes : 64));
  STD_TORCH_CHECK(p != nullptr, "out of memory: ", bytes, " bytes of workspace");
  return Floats(p);
}

// The calling thread's workspace stays allocated between calls (up to 64 MiB): fresh pages would cost as much as a
// twentieth of a warm iteration.
float* workspace(int64_t floats) {
  thread_local Floats kept;
  thread_local int64_t size = 0;
  if (floats > size || size > (int64_t(16) << 20)) {
    kept.reset();
    size = 0;
    kept = allocate(floats);
    size = floats;
  }
  return kept.get();
}

Scale scale_for(int e) {
  // fp32 squares and products are safe for |e| <= 40; beyond that elements are scaled as they are loaded, as far as a
  // normal factor reaches, and the rest of the exponent goes into the weights.
  const int load = e >= -40 && e <= 40 ? 0 : std::min(126, std::max(-126, e));
  const double rest = std::ldexp(1.0, -2 * (e - load));
  return {float(std::ldexp(1.0, -load)), rest, rest};
}

struct Task { int64_t matrix, row, rows; };

struct Job {
  int64_t first = 0, tasks = 0, wide = 0;  // tasks of this matrix, floats per vector
  int e = 0;
  const float* v = nullptr;  // block vectors in working order
  float* z = nullptr;        // partials of the tasks, `block * wide` floats each; the sum ends in the first
  double fro2 = 0;           // of W'
  std::vector<double> yy;
  bool active = true;
  std::atomic<int64_t> open{0};
};

// One pass over all matrices. After a matrix's last task the thread that did it sums the partials in task order and calls
// `finish(i)`, while the others go on.
struct Pass {
  const SpectralTable& k;
  const Matrix* ws;
  int64_t count, block;
  std::vector<Job> jobs;
  std::vector<Task> tasks;
  std::vector<double> yy, fro2;  // per task
  int64_t elements = 0, vector_floats = 0, z_floats = 0;

  Pass(Isa isa, const Matrix* ws, int64_t count, int64_t block)
      : k(pick<SpectralTable>(isa)), ws(ws), count(count), block(block), jobs(count) {
    for (int64_t i = 0; i < count; ++i) {
      const Matrix& m = ws[i];
      Job& job = jobs[i];
      job.first = int64_t(tasks.size());
      job.wide = (m.n + 31) / 32 * 32;
      job.yy.resize(block * block);
      job.active = m.m > 0 && m.n > 0;
      if (!job.active) continue;
      const int64_t rows = (std::max(kTaskElements / m.n, m.m / kMostTasks) / 16 + 1) * 16;
      for (int64_t row = 0; row < m.m; row += rows) tasks.push_back({i, row, std::min(rows, m.m - row)});
      job.tasks = int64_t(tasks.size()) - job.first;
      elements += m.m * m.n;
      vector_floats += block * job.wide;
      z_floats += block * job.wide * job.tasks;
    }
    yy.resize(tasks.size() * block * block);
    fro2.resize(tasks.size());
  }

  void place_partials(float* p) {
    for (Job& job : jobs) {
      job.z = p;
      p += block * job.wide * job.tasks;
    }
  }

  void sweep_task(int64_t t) {
    const Task& task = tasks[t];
    Job& job = jobs[task.matrix];
    k.sweep(ws[task.matrix], task.row, task.rows, scale_for(job.e), job.v, block, job.wide,
            job.z + (t - job.first) * block * job.wide, &yy[t * block * block], &fro2[t]);
  }

  void gather(int64_t i) {
    Job& job = jobs[i];
    k.gather(job.z, job.tasks, block * job.wide);
    job.fro2 = 0;
    for (double& x : job.yy) x = 0;
    for (int64_t t = job.first; t < job.first + job.tasks; ++t) {
      job.fro2 += fro2[t];
      for (int64_t j = 0; j < block * block; ++j) job.yy[j] += yy[t * block * block + j];
    }
  }

  template <class F>
  void run(const F& finish) {
    for (Job& job : jobs) job.open.store(job.active ? job.tasks : 0, std::memory_order_relaxed);
    run_tasks(int64_t(tasks.size()), elements < kSerialElements, [&](int64_t t) {
      Job& job = jobs[tasks[t].matrix];
      if (!job.active) return;
      sweep_task(t);
      if (job.open.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        gather(tasks[t].matrix);
        finish(tasks[t].matrix);
      }
    });
  }

  // Sees to it that the exponent fits the matrix, so that nothing over- or underflowed; repeats the matrix if it did not.
  // Returns false where there is nothing to normalise: a zero (fro2 = 0) or non-finite (fro2 = NaN) matrix.
  bool settle(int64_t i) {
    Job& job = jobs[i];
    if (job.fro2 >= 0x1p-40 && job.fro2 <= 0x1p40) return true;
    const double most = k.absmax(ws[i]);
    job.fro2 = most == 0 ? 0 : kNan;
    if (!(most > 0 && std::isfinite(most))) return false;
    job.e = std::ilogb(most * std::sqrt(double(ws[i].m)) * 0.5);
    for (int64_t t = job.first; t < job.first + job.tasks; ++t) sweep_task(t);
    gather(i);
    return true;
  }
};

// Where a matrix's segment of the state starts.
std::vector<int64_t> segments(const Matrix* ws, int64_t count, int64_t block) {
  std::vector<int64_t> starts(count + 1, 0);
  for (int64_t i = 0; i < count; ++i) starts[i + 1] = starts[i] + kPad + block * padded(ws[i].n);
  return starts;
}

int read_exponent(float word) { return word >= -200 && word <= 200 ? int(word) : 0; }

// The exponent of |W|_F; the old one stays where there is none: a zero or non-finite matrix, and one of denormals of which
// a thread that flushes them saw nothing.
void write_exponent(const Job& job, float* word) {
  if (job.fro2 > 0 && std::isfinite(job.fro2)) *word = float(job.e + std::ilogb(std::sqrt(job.fro2)));
}

struct Result { double sigma, residual; };

// One power step from v (unit): see ops/spectral for the algebra. `v` becomes z / sigma; false: leave the state alone.
bool finish_one(const Pass& pass, int64_t i, float* v, Result* out) {
  const Job& job = pass.jobs[i];
  const double s0 = std::sqrt(job.yy[0]), sigma = std::sqrt(pass.k.dot(job.z, job.z, job.wide)) / s0;
  if (!std::isfinite(sigma) || sigma == 0) {
    // v is orthogonal to every row: nothing is known but 0 <= sigma_max <= |W|_F.
    *out = s0 == 0 || sigma == 0 ? Result{0, std::sqrt(2 * job.fro2)} : Result{kNan, kNan};
    return false;
  }
  const double r = std::sqrt(pass.k.gap2(1 / s0, job.z, s0, v, job.wide));
  *out = {sigma, r * std::sqrt(std::max(0.0, 3 * sigma - s0) / (sigma + s0))};
  pass.k.blend(1 / (sigma * s0), job.z, 0, v, job.wide);
  return true;
}

// Rayleigh-Ritz on the span of V. `v` (block rows) becomes an orthonormal basis of Z Q, the top Ritz vector first.
bool finish_block(const Pass& pass, int64_t i, float* v, Result* out) {
  const Job& job = pass.jobs[i];
  const SpectralTable& k = pass.k;
  const int64_t b = pass.block, wide = job.wide;
  double g[kMaxBlock * kMaxBlock], q[kMaxBlock * kMaxBlock];
  bool finite = true;
  for (int64_t r = 0; r < b; ++r) {
    for (int64_t c = 0; c <= r; ++c) {
      const double x = 0.5 * (k.dot(v + r * wide, job.z + c * wide, wide) + k.dot(v + c * wide, job.z + r * wide, wide));
      g[r * b + c] = g[c * b + r] = x;
      finite = finite && std::isfinite(x);
    }
  }
  if (!finite) return *out = {kNan, kNan}, false;
  int order[kMaxBlock];
  jacobi(int(b), g, q, order);  // columns of q, eigenvalues on the diagonal of g, descending in `order`
  const double lambda = g[order[0] * (b + 1)];
  if (!(lambda > 0)) return *out = {0, std::sqrt(2 * job.fro2)}, false;
  const Floats fresh_memory = allocate((b + 1) * wide);
  float *fresh = fresh_memory.get(), *top = fresh + b * wide;
  auto combine = [&](const float* rows, int column, float* y) {
    for (int64_t c = 0; c < b; ++c) k.blend(q[c * b + column], rows + c * wide, c == 0 ? 0.0 : 1.0, y, wide);
  };
  std::fill(fresh, fresh + (b + 1) * wide, 0.0f);
  combine(v, order[0], top);
  combine(job.z, order[0], fresh);
  const double s0 = std::sqrt(lambda), sigma = std::sqrt(k.dot(fresh, fresh, wide)) / s0;
  if (!std::isfinite(sigma) || sigma == 0) return *out = {sigma == 0 ? 0.0 : kNan, sigma == 0 ? std::sqrt(2 * job.fro2) : kNan}, false;
  const double r = std::sqrt(k.gap2(1 / s0, fresh, s0, top, wide));
  *out = {sigma, r * std::sqrt(std::max(0.0, 3 * sigma - s0) / (sigma + s0))};

  // Gram-Schmidt, twice; where a column of Z Q has no direction of its own, an old vector that has one takes its place.
  auto orthonormal = [&](float* x, int64_t before, double least) {
    const double start = std::sqrt(k.dot(x, x, wide));
    if (!(start > 0)) return false;
    k.blend(1 / start, x, 0, x, wide);
    for (int round = 0; round < 2; ++round)
      for (int64_t c = 0; c < before; ++c) k.blend(-k.dot(fresh + c * wide, x, wide), fresh + c * wide, 1, x, wide);
    const double left = std::sqrt(k.dot(x, x, wide));
    if (!(left > least)) return false;
    k.blend(1 / left, x, 0, x, wide);
    return true;
  };
  for (int64_t c = 0; c < b; ++c) {
    float* x = fresh + c * wide;
    combine(job.z, order[c], x);
    bool good = orthonormal(x, c, 1e-4);
    for (int64_t old = 0; old < b && !good; ++old) {
      std::copy(v + old * wide, v + (old + 1) * wide, x);
      good = orthonormal(x, c, 0.5 / std::sqrt(double(b)));
    }
    if (!good) std::fill(x, x + wide, 0.0f);  // fewer columns than vectors
  }
  std::copy(fresh, fresh + b * wide, v);
  return true;
}

void write_result(const Job& job, const Result& r, int64_t i, int64_t count, float* out) {
  const double unit = std::ldexp(1.0, job.e);
  out[i] = float(r.sigma * unit);
  out[count + i] = float(r.residual * unit);
  out[2 * count + i] = float(std::sqrt(job.fro2) * unit);
}

void write_state(const Pass& pass, int64_t i, const float* v, float* segment) {
  const Job& job = pass.jobs[i];
  const Matrix& m = pass.ws[i];
  for (int64_t r = 0; r < pass.block; ++r)
    pass.k.restore(m.dtype, v + r * job.wide, m.n, segment + kPad + r * padded(m.n));
}

}  // namespace

void gram_matvec(Isa isa, const Matrix* ws, int64_t count, const float* state, int64_t block, float* z, float* yy,
                 float* fro2) {
  Pass pass(isa, ws, count, block);
  float* memory = workspace(pass.vector_floats + pass.z_floats);
  pass.place_partials(memory + pass.vector_floats);
  const std::vector<int64_t> starts = segments(ws, count, block);
  float* v = memory;
  for (int64_t i = 0; i < count; ++i) {
    Job& job = pass.jobs[i];
    const float* segment = state + starts[i];
    float* rows = z + starts[i] - i * kPad;
    std::fill(rows, rows + block * padded(ws[i].n), 0.0f);
    std::fill(yy + i * block * block, yy + (i + 1) * block * block, 0.0f);
    fro2[i] = 0;
    if (!job.active) continue;
    job.e = read_exponent(segment[0]);
    job.v = v;
    for (int64_t r = 0; r < block; ++r, v += job.wide)
      pass.k.arrange(ws[i].dtype, segment + kPad + r * padded(ws[i].n), ws[i].n, job.wide, v);
  }
  pass.run([&](int64_t i) {
    const Job& job = pass.jobs[i];
    float* rows = z + starts[i] - i * kPad;
    for (int64_t r = 0; r < block; ++r)
      pass.k.restore(ws[i].dtype, job.z + r * job.wide, ws[i].n, rows + r * padded(ws[i].n));
    for (int64_t j = 0; j < block * block; ++j) yy[i * block * block + j] = float(job.yy[j]);
    fro2[i] = float(job.fro2);
  });
}

void spectral_norm(Isa isa, const Matrix* ws, int64_t count, float* state, int64_t block, float* out, int64_t iters) {
  Pass pass(isa, ws, count, block);
  float* memory = workspace(pass.vector_floats + pass.z_floats);
  pass.place_partials(memory + pass.vector_floats);
  const std::vector<int64_t> starts = segments(ws, count, block);
  float* v = memory;
  for (int64_t i = 0; i < count; ++i) {
    Job& job = pass.jobs[i];
    out[i] = out[count + i] = out[2 * count + i] = 0;
    if (!job.active) continue;
    const float* segment = state + starts[i];
    job.e = read_exponent(segment[0]);
    job.v = v;
    for (int64_t r = 0; r < block; ++r, v += job.wide)
      pass.k.arrange(ws[i].dtype, segment + kPad + r * padded(ws[i].n), ws[i].n, job.wide, v);
  }
  for (int64_t step = 0; step < iters; ++step) {
    pass.run([&](int64_t i) {
      Job& job = pass.jobs[i];
      Result result;
      bool moved = false;
      float* vectors = memory + (job.v - memory);
      if (!pass.settle(i)) result = {job.fro2, job.fro2};
      else if (block == 1) moved = finish_one(pass, i, vectors, &result);
      else moved = finish_block(pass, i, vectors, &result);
      write_result(job, result, i, count, out);
      write_exponent(job, state + starts[i]);
      if (!moved) job.active = false;
      else if (step + 1 == iters) write_state(pass, i, vectors, state + starts[i]);
    });
  }
}

void lanczos(Isa isa, const Matrix* ws, int64_t count, float* state, float* out, int64_t iters) {
  Pass pass(isa, ws, count, 1);
  const std::vector<int64_t> starts = segments(ws, count, 1);
  const Floats basis_memory = allocate(pass.vector_floats * iters);
  pass.place_partials(workspace(pass.z_floats));
  struct Recurrence { float* q; std::vector<double> alpha, beta; };
  std::vector<Recurrence> runs(count);
  float* q = basis_memory.get();
  for (int64_t i = 0; i < count; ++i) {
    Job& job = pass.jobs[i];
    out[i] = out[count + i] = out[2 * count + i] = 0;
    if (!job.active) continue;
    job.e = read_exponent(state[starts[i]]);
    job.v = runs[i].q = q;
    pass.k.arrange(ws[i].dtype, state + starts[i] + kPad, ws[i].n, job.wide, q);
    const double norm = std::sqrt(pass.k.dot(q, q, job.wide));
    if (norm > 0 && std::isfinite(norm)) pass.k.blend(1 / norm, q, 0, q, job.wide);
    q += job.wide * iters;
    const size_t steps = size_t(std::min(iters, ws[i].n));
    runs[i].alpha.reserve(steps), runs[i].beta.reserve(steps);
  }
  auto solve = [&](int64_t i) {
    Job& job = pass.jobs[i];
    Recurrence& run = runs[i];
    const int steps = int(run.alpha.size());
    std::vector<double> s(steps);
    const double theta = top_of_tridiagonal(steps, run.alpha.data(), run.beta.data(), s.data());
    job.active = false;
    const double fro = std::sqrt(job.fro2);
    write_exponent(job, state + starts[i]);
    if (!(theta > 0)) return write_result(job, theta <= 0 ? Result{0, std::sqrt(2.0) * fro} : Result{kNan, kNan}, i, count, out);
    const double sigma = std::sqrt(theta);
    write_result(job, {sigma, std::sqrt(2.0) * run.beta[steps - 1] * std::fabs(s[steps - 1]) / sigma}, i, count, out);
    for (int j = 0; j < steps; ++j) pass.k.blend(s[j], run.q + j * job.wide, j == 0 ? 0.0 : 1.0, job.z, job.wide);
    pass.k.blend(1 / std::sqrt(pass.k.dot(job.z, job.z, job.wide)), job.z, 0, job.z, job.wide);
    write_state(pass, i, job.z, state + starts[i]);
  };
  for (int64_t step = 0; step < iters; ++step) {
    pass.run([&](int64_t i) {
      Job& job = pass.jobs[i];
      Recurrence& run = runs[i];
      if (step == 0 && !pass.settle(i)) {
        job.active = false;
        return write_result(job, {job.fro2, job.fro2}, i, count, out);
      }
      const int64_t wide = job.wide;
      const float* now = run.q + step * wide;
      run.alpha.push_back(pass.k.dot(now, job.z, wide));
      for (int round = 0; round < 2; ++round)
        for (int64_t j = step; j >= 0; --j)
          pass.k.blend(-pass.k.dot(run.q + j * wide, job.z, wide), run.q + j * wide, 1, job.z, wide);
      run.beta.push_back(std::sqrt(pass.k.dot(job.z, job.z, wide)));
      double largest = 0;
      for (size_t j = 0; j < run.alpha.size(); ++j) largest = std::max(largest, std::fabs(run.alpha[j]) + (j ? run.beta[j - 1] : 0));
      const double beta = run.beta.back();
      // A tiny beta means that the vectors so far span an invariant subspace: rank 1, orthogonal, n vectors used up.
      if (step + 1 == iters || step + 1 >= ws[i].n || !(beta > 1e-6 * largest)) return solve(i);
      float* next = run.q + (step + 1) * wide;
      pass.k.blend(1 / beta, job.z, 0, next, wide);
      job.v = next;
    });
  }
}

}  // namespace fastmon
