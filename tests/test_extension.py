"""The raw CPU launchers of fastmon_C against fp64 references, for every instruction set of this machine."""

import functools
import itertools
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmon import backend
from tests.launchers import (
    DTYPES,
    SIZES,
    fresh_state,
    lanczos,
    moments,
    pair_moments,
    spectral_norm,
)

missing = backend.extension()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

SPECTRAL = str(Path(__file__).with_name("test_extension_spectral.py"))
CSRC = Path(__file__).resolve().parent.parent / "csrc" / "cpu"
ISAS = ("portable", "avx2", "avx512")

# -- moments ---------------------------------------------------------------------------------------------------------

FILLS = {
    "normal": lambda n: torch.randn(n),
    "mean 1e4": lambda n: torch.randn(n) + 1e4,
    "tiny": lambda n: torch.randn(n) * 1e-30,
    "huge": lambda n: torch.randn(n) * 1e30,
    "constant": lambda n: torch.full((n,), -3.5),
    "sparse": lambda n: torch.randn(n) * (torch.rand(n) < 0.05),
    "first value off": lambda n: torch.cat([torch.full((1,), 1e6), torch.randn(n - 1)]),
    "scales mixed": lambda n: torch.randn(n) * 10.0 ** torch.randint(-20, 3, (n,)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", FILLS)
def test_moments_match_fp64(dtype, fill):
    xs = [FILLS[fill](n).to(dtype) for n in SIZES]
    xs = [x for x in xs if torch.isfinite(x).all()]
    before = [x.clone() for x in xs]
    counts, stats = moments(xs, 4)
    assert torch.equal(moments(xs, 2)[0], counts)
    torch.testing.assert_close(moments(xs, 2)[1], stats[:7], rtol=1e-6, atol=0)
    for i, x in enumerate(xs):
        d = x.double()
        e = d - d.mean()
        assert counts[:, i].tolist() == [x.numel(), int((x == 0).sum()), 0]
        mean, m2, sumsq, least, most, absmax, l2, m3, m4 = stats[:, i].double()
        assert (least, most, absmax) == (d.min(), d.max(), d.abs().max())
        torch.testing.assert_close(l2, d.norm(), rtol=3e-6, atol=0)
        torch.testing.assert_close(mean, d.mean(), rtol=2e-7, atol=1e-6 * float(d.square().mean().sqrt()))
        for got, power, signed in ((m2, 2, False), (m3, 3, True), (m4, 4, False)):
            size = (e.abs() ** power).sum()
            if 1e-36 < size < 1e38:
                want = (e**power).sum()
                slack = float(size) if signed else 0.0
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * slack)
        if 1e-36 < (d**2).sum() < 1e38:
            torch.testing.assert_close(sumsq, (d**2).sum(), rtol=5e-6, atol=0)
        assert torch.equal(x, before[i])


def test_moments_of_bad_and_empty_tensors_spoil_nothing_else():
    bad = torch.randn(20000)
    bad[3], bad[19999], bad[500] = float("nan"), float("inf"), 0
    good = torch.randn(20000)
    xs = [
        good,
        bad,
        torch.empty(0),
        torch.full((3,), float("-inf")),
        torch.zeros(5000),
        good.to(torch.bfloat16),
    ]
    counts, stats = moments(xs, 4)
    assert counts.tolist() == [[20000, 20000, 0, 3, 5000, 20000], [0, 1, 0, 0, 5000, 0], [0, 2, 0, 3, 0, 0]]
    assert torch.isnan(stats[:, [1, 3]]).all()
    assert stats[:, 2].tolist() == [0, 0, 0, float("inf"), float("-inf"), 0, 0, 0, 0]
    assert not stats[:, 4].any()
    torch.testing.assert_close(stats[:, 0], moments([good], 4)[1][:, 0], rtol=0, atol=0)
    torch.testing.assert_close(stats[6, 5], good.to(torch.bfloat16).double().norm().float())


def test_moments_of_denormals():
    x = torch.full((1000,), 1e-40)
    counts, stats = moments([x])
    assert counts[1, 0] == 0
    torch.testing.assert_close(stats[6, 0].double(), x.double().norm(), rtol=1e-4, atol=0)


# -- pair moments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sx", "sy"), list(itertools.product((1.0, 1e-30, 1e30), repeat=2)))
def test_pair_moments_match_fp64(dtype, sx, sy):
    xs = [(torch.randn(n) * sx).to(dtype) for n in SIZES]
    ys = [(torch.randn(n) * sy).to(dtype) for n in SIZES]
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if torch.isfinite(x + y).all()]
    out = pair_moments([x for x, _ in pairs], [y for _, y in pairs]).double()
    for i, (x, y) in enumerate(pairs):
        a, b = x.double(), y.double()
        want = torch.stack([a.norm(), b.norm(), (a - b).norm()])
        torch.testing.assert_close(out[4:7, i], want, rtol=2e-6, atol=0)
        if a.norm() > 0 and b.norm() > 0:
            torch.testing.assert_close(out[7, i], (a / a.norm()) @ (b / b.norm()), rtol=0, atol=2e-6)
        else:
            assert torch.isnan(out[7, i])
        sums = torch.stack([a @ b, a @ a, b @ b, (a - b) @ (a - b)])
        seen = (sums.abs() > 1e-36) & (sums.abs() < 1e38)
        slack = 3e-6 * float(a.norm() * b.norm())
        torch.testing.assert_close(out[:4, i][seen], sums[seen], rtol=5e-6, atol=slack)


def test_pair_moments_keep_a_small_difference_and_clamp():
    x = torch.randn(50000)
    y = x + 1e-4 * torch.randn(50000)
    out = pair_moments([x, x, x, torch.zeros(9), torch.empty(0)], [y, x, -x, torch.ones(9), torch.empty(0)])
    torch.testing.assert_close(out[6, 0].double(), (x.double() - y.double()).norm(), rtol=1e-6, atol=0)
    assert out[3, 1] == 0
    assert out[7, 1] == 1
    assert out[7, 2] == -1
    assert torch.isnan(out[7, 3:]).all()
    assert out[:7, 4].tolist() == [0] * 7
    bad = x.clone()
    bad[7] = float("inf")
    both = pair_moments([bad, x], [x, y])
    assert torch.isnan(both[:, 0]).all()
    assert torch.equal(both[:, 1], out[:, 0])


def test_rows_may_lie_apart_and_dtypes_may_mix():
    wide = torch.randn(80, 200)
    ws = [wide[:, 3:90], wide[::2, :64].bfloat16(), wide[5:6, 7:], wide.half()[:, 100:133]]
    dense = [w.contiguous() for w in ws]
    a, b = fresh_state(ws), fresh_state(ws)
    assert torch.equal(spectral_norm(ws, a, 2), spectral_norm(dense, b, 2))
    assert torch.equal(a, b)
    alone = torch.cat([spectral_norm([w], fresh_state([w]), 2) for w in ws], dim=1)
    assert torch.equal(spectral_norm(ws, fresh_state(ws), 2), alone)


# -- the build -------------------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_number_of_threads():
    xs = (
        [torch.randn(n) for n in (3, 70001, 600000)]
        + [torch.randn(300000).bfloat16()]
        + [torch.randn(700)] * 300
    )
    ys = [torch.randn_like(x) for x in xs]
    ws = [
        torch.randn(2304, 768),
        torch.randn(768, 2000).bfloat16(),
        torch.randn(5, 7),
        torch.randn(1000, 999),
    ]
    runs = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4, 2):
            torch.set_num_threads(count)
            one, four, cold = fresh_state(ws), fresh_state(ws, 4), fresh_state(ws)
            runs.append(
                [
                    *moments(xs, 4),
                    pair_moments(xs, ys),
                    spectral_norm(ws, one, 3),
                    spectral_norm(ws, four, 2),
                    lanczos(ws, cold, 6),
                    one,
                    four,
                    cold,
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


LOOP = """
#include <cstdio>
#include <new>
#include <string>
#include <thread>
#include <vector>
#include "launch.h"

extern "C" AOTITorchError torch_get_num_threads(uint32_t* n) { return *n = 4, AOTI_TORCH_SUCCESS; }
extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc f, void* context) {
  std::vector<std::thread> pool;
  for (int64_t i = begin; i < end; ++i) pool.emplace_back(f, i, i + 1, context);
  for (std::thread& t : pool) t.join();
  return AOTI_TORCH_SUCCESS;
}

int main() {
  for (int bad = 0; bad < 100; bad += 9) {  // two tasks fail, usually in two threads
    std::vector<int> done(100);
    try {
      fastmon::run_tasks(100, false, [&](int64_t t) {
        if (t == bad || t == bad + 1) throw std::bad_alloc();
        ++done[t];
      });
      return std::puts("nothing was thrown"), 1;
    } catch (const std::bad_alloc&) {
    }
    for (int t = 0; t < 100; ++t)
      if (t < bad ? done[t] != 1 : done[t] > int(t != bad))
        return std::printf("task %d ran %d times\\n", t, done[t]), 1;
  }
  std::vector<int> done(100);
  fastmon::run_tasks(100, false, [&](int64_t t) { ++done[t]; });
  for (int times : done)
    if (times != 1) return std::puts("a task did not run once"), 1;
}
"""


@pytest.mark.skipif("FASTMON_CPU_ISA" in os.environ, reason="once is enough")
def test_a_task_that_runs_out_of_memory_raises_in_the_caller(tmp_path):
    """The task loop on threads of its own: an exception that left the callback would end the process."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler")
    source, program = tmp_path / "loop.cpp", tmp_path / "loop"
    source.write_text(LOOP)
    includes = [f"-I{Path(torch.__file__).parent / 'include'}", f"-I{CSRC}"]
    build = [*compiler, "-std=c++17", "-pthread", *includes, str(source), "-o", str(program)]
    subprocess.run(build, check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_lists_equal_loops_and_may_be_empty():
    xs = [torch.randn(n) for n in range(1, 200)]
    counts, stats = moments(xs, 4)
    loops = [moments([x], 4) for x in xs]
    assert torch.equal(counts, torch.cat([c for c, _ in loops], dim=1))
    assert torch.equal(stats, torch.cat([s for _, s in loops], dim=1))
    assert moments([])[1].shape == (7, 0)
    assert pair_moments([], []).shape == (8, 0)
    assert spectral_norm([], torch.zeros(0)).shape == lanczos([], torch.zeros(0)).shape == (3, 0)


def test_denormals_survive_loading():
    assert float(torch.tensor(1e-40) * 1) != 0


def test_wrong_arguments_are_refused():
    w = torch.randn(4, 6)
    with pytest.raises(RuntimeError, match="does not fit"):
        spectral_norm([w], torch.zeros(20))
    with pytest.raises(RuntimeError, match="iters must be at least 1"):
        spectral_norm([w], fresh_state([w]), 0)
    with pytest.raises(RuntimeError, match="row-major"):
        spectral_norm([w.T], fresh_state([w.T]))
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        moments([torch.zeros(3, dtype=torch.float64)])


@functools.cache
def best_isa():
    code = (
        "from fastmon import backend; import torch; backend.extension(); print(torch.ops.fastmon_C.cpu_isa())"
    )
    free = {k: v for k, v in os.environ.items() if k != "FASTMON_CPU_ISA"}
    done = subprocess.run([sys.executable, "-c", code], env=free, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(
    "FASTMON_CPU_ISA" in os.environ, reason="runs the other tests once for each instruction set"
)
def test_every_lower_instruction_set_passes_the_same_tests():
    best = best_isa()
    assert torch.ops.fastmon_C.cpu_isa() == best
    for isa in ISAS[: ISAS.index(best)]:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, SPECTRAL]
        done = subprocess.run(
            command, env={**os.environ, "FASTMON_CPU_ISA": isa}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{isa}:\n{done.stdout[-3000:]}"


def test_the_environment_chooses_the_instruction_set():
    assert torch.ops.fastmon_C.cpu_isa() == (os.environ.get("FASTMON_CPU_ISA") or best_isa())


@pytest.mark.skipif("FASTMON_CPU_ISA" in os.environ, reason="once is enough")
def test_an_unknown_instruction_set_is_refused():
    code = "from fastmon import backend; import torch; backend.extension(); torch.ops.fastmon_C.cpu_isa()"
    env = {**os.environ, "FASTMON_CPU_ISA": "sse9"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "FASTMON_CPU_ISA is 'sse9'; wanted portable, avx2 or avx512" in done.stderr
