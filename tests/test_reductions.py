"""moments and pair_moments: every implementation row against fp64 truth, on hostile inputs."""

import math

import pytest
import torch

from fastmon import backend, ops
from fastmon.backend import OPS, Facts, force
from tests import cases
from tests.compare import assert_close, assert_equal, assert_unwritten, bits

RTOL = {dtype: tolerance.rtol for dtype, tolerance in OPS["moments"].tolerance.items()}


def rows(name):
    facts = Facts("cpu", frozenset({torch.float32}))
    return [impl.name for impl, reason in backend.explain(OPS[name], facts) if reason is None]


def exact_moments(x, order=4):
    x = x.double().reshape(-1)
    n = x.numel()
    mean = x.mean() if n else torch.tensor(0.0)
    d = x - mean
    return {
        "numel": n,
        "zeros": int((x == 0).sum()),
        "mean": float(mean),
        "m2": float((d**2).sum()),
        "sumsq": float((x**2).sum()),
        "min": float(x.min()) if n else math.inf,
        "max": float(x.max()) if n else -math.inf,
        "absmax": float(x.abs().max()) if n else 0.0,
        "l2": float((x**2).sum().sqrt()),
        "m3": float((d**3).sum()),
        "m4": float((d**4).sum()),
        "scale": float((d.abs() ** 3).sum()),
    }


@pytest.mark.parametrize("row", rows("moments"))
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_moments_equal_fp64(row, dtype):
    named = cases.tensors(dtype)
    before = bits(list(named.values()))
    with force(row):
        got = ops.moments(list(named.values()), order=4)
    assert_unwritten(list(named.values()), before)
    for i, (name, x) in enumerate(named.items()):
        want = exact_moments(x)
        for key in ("numel", "zeros", "min", "max", "absmax"):
            assert getattr(got, key)[i].item() == want[key], (name, key)
        spread = math.sqrt(want["m2"] / max(want["numel"], 1))
        slack = {"mean": 1e-5 * spread + 1e-6 * abs(want["mean"]), "m2": 1e-6, "m3": 2e-5 * want["scale"]}
        for key in ("mean", "m2", "sumsq", "l2", "m3", "m4"):
            tolerance = RTOL[dtype] * abs(want[key]) + slack.get(key, 0.0)
            assert abs(getattr(got, key)[i].item() - want[key]) <= tolerance, (
                name,
                key,
                got[3][i],
                want[key],
            )
    assert got.nonfinite.sum() == 0


@pytest.mark.parametrize("row", rows("moments"))
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e12, 1e20, 1e30])
def test_norms_survive_the_range_of_fp32(row, scale):
    x = cases.gaussian(20_000, scale=scale)
    y = cases.gaussian(20_000, scale=scale) + x / 2
    mixed = torch.cat([x, cases.gaussian(20_000)])
    with force(row):
        m, p = ops.moments([x, mixed]), ops.pair_moments([x], [y])
    assert_close(m.l2, torch.stack([x.double().norm(), mixed.double().norm()]), 1e-5)
    assert_close(m.global_l2, torch.stack([x.double().norm(), mixed.double().norm()]).norm(), 1e-5)
    cosine = x.double() @ y.double() / x.double().norm() / y.double().norm()
    assert_close(p.cosine, cosine[None], 1e-5)
    assert_close(p.global_cosine, cosine, 1e-5)
    assert_close(p.norm_ratio, (x.double().norm() / y.double().norm())[None], 1e-5)
    assert_close(p.d_l2, (x.double() - y.double()).norm()[None], 1e-5)


@pytest.mark.parametrize("row", rows("moments"))
def test_nonfinite_stays_in_its_tensor(row):
    bad = cases.gaussian(30_000)
    bad[7], bad[20_000], bad[29_999] = torch.nan, torch.inf, -torch.inf
    clean = cases.gaussian(100)
    with force(row):
        m = ops.moments([clean, bad, clean], order=4)
        p = ops.pair_moments([clean, bad, clean], [clean, bad, 2 * clean])
    assert m.nonfinite.tolist() == [0, 3, 0]
    for field in m[3:]:
        assert torch.isnan(field[1])
        assert torch.isfinite(field[[0, 2]]).all()
    assert torch.isnan(torch.stack(p)[:, 1]).all()
    assert torch.isfinite(torch.stack(p)[:, [0, 2]]).all()


@pytest.mark.parametrize("row", rows("moments"))
def test_a_large_mean_cancels_nothing(row):
    x = (torch.randn(200_000, dtype=torch.float64) + 1e4).float()
    with force(row):
        m = ops.moments(x, order=4)
    d = x.double() - x.double().mean()
    assert_close(m.std, d.square().mean().sqrt()[None], 1e-4)
    assert_close(m.kurtosis, (d**4).mean()[None] / d.square().mean() ** 2, 1e-3)


@pytest.mark.parametrize("row", rows("moments"))
def test_merging_parts_equals_the_whole(row):
    parts = [cases.gaussian(n) * s + m for n, s, m in ((1000, 1, 50), (1, 1, 0), (0, 1, 0), (777, 3, -20))]
    with force(row):
        whole = ops.moments(torch.cat(parts), order=4)
        merged = ops.moments(parts[0], order=4)
        for part in parts[1:]:
            merged = ops.merge_moments(merged, ops.moments(part, order=4))
    for name, a, b in zip(whole._fields, merged, whole, strict=True):
        assert_close(a, b, 1e-4, 1e-6, name)


@pytest.mark.parametrize("row", rows("moments"))
def test_deterministic_and_independent_of_grouping(row):
    xs = [*list(cases.tensors(torch.float32).values()), cases.gaussian(300000)]
    ys = [x.flip(0) if x.ndim else x for x in xs]
    with force(row):
        first, again = ops.moments(xs), ops.moments(xs)
        pairs, pairs_again = ops.pair_moments(xs, ys), ops.pair_moments(xs, ys)
        for i, x in enumerate(xs):
            alone = ops.moments([x])
            for a, b, c in zip(first[:10], again[:10], alone[:10], strict=True):
                assert_equal(a[i], b[i])
                assert_equal(a[i], c[0])
        assert_equal(torch.stack(pairs), torch.stack(pairs_again))


@pytest.mark.parametrize("row", rows("pair_moments"))
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_pair_moments_equal_fp64(row, dtype):
    named = cases.tensors(dtype)
    xs = list(named.values())
    ys = [cases.gaussian(*x.shape, dtype=dtype) if x.ndim else x * 2 for x in xs]
    ys[list(named).index("transposed")] = (
        xs[list(named).index("transposed")] * 3
    )  # same strides as its partner
    before = bits(xs + ys)
    with force(row):
        got = ops.pair_moments(xs, ys)
    assert_unwritten(xs + ys, before)
    for i, (name, x, y) in enumerate(zip(named, xs, ys, strict=True)):
        x, y = x.double().reshape(-1), y.double().reshape(-1)
        size = float(x.norm() * y.norm())
        assert abs(got.dot[i].item() - float(x @ y)) <= 1e-5 * size + 1e-6, name
        for key, want in (("xx", x @ x), ("yy", y @ y), ("dd", (x - y) @ (x - y))):
            assert_close(getattr(got, key)[i], want, 2e-5, 1e-6, f"{name} {key}")
        if size:
            assert abs(got.cosine[i].item() - float(x @ y) / size) <= 1e-5, name
        else:
            assert torch.isnan(got.cosine[i]), name


def test_global_cosine_is_of_summed_dots():
    xs, ys = [cases.gaussian(50), cases.gaussian(5, 3) * 100], [cases.gaussian(50), cases.gaussian(5, 3)]
    x, y = (torch.cat([t.reshape(-1).double() for t in side]) for side in (xs, ys))
    assert_close(ops.pair_moments(xs, ys).global_cosine, x @ y / x.norm() / y.norm(), 1e-5)


@pytest.fixture
def fp64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("row", rows("moments"))
def test_the_default_dtype_changes_nothing(row, fp64_by_default):
    x, y = cases.gaussian(40, 48), cases.gaussian(40, 48)
    with force(row):
        m, p, s = ops.moments(x), ops.pair_moments(x, y), ops.lanczos_norm(x)
    assert {t.dtype for t in (*m[3:10], *p, *s)} == {torch.float32}
    assert_close(m.l2, x.double().norm()[None], 1e-5)
    assert_close(
        p.cosine, ((x.double() * y.double()).sum() / x.double().norm() / y.double().norm())[None], 1e-4
    )
    assert_close(s.sigma, torch.linalg.svdvals(x.double())[:1], 1e-2)


def test_fp64_inputs_keep_their_range():
    m = ops.moments(
        [torch.tensor([1e300, 1.0], dtype=torch.float64), torch.full((4,), 1e-60, dtype=torch.float64)]
    )
    assert m.nonfinite.tolist() == [0, 0]
    assert m.zeros.tolist() == [0, 0]
    p = ops.pair_moments(
        torch.full((4,), 1e-60, dtype=torch.float64), torch.full((4,), 1e60, dtype=torch.float64)
    )
    assert_close(p.cosine, torch.ones(1), 1e-6)


def test_merging_survives_empty_parts_and_huge_counts():
    empty, big = ops.moments(torch.empty(0)), ops.moments(torch.full((10,), 1e20))
    for merged in (ops.merge_moments(empty, big), ops.merge_moments(big, empty)):
        assert merged.m2.item() == 0
        assert merged.mean.item() == big.mean.item()
    half = ops.moments(cases.gaussian(1000), order=4)
    many = half._replace(numel=half.numel * 5_000_000, m2=half.m2 * 5e6, m3=half.m3 * 5e6, m4=half.m4 * 5e6)
    merged = ops.merge_moments(many, many._replace(mean=many.mean + 0.5))
    assert torch.isfinite(merged.kurtosis).all()
    assert merged.numel.item() == 10**10


def test_results_are_plain_named_tuples():
    p = ops.pair_moments(cases.gaussian(9), cases.gaussian(9))
    assert torch.equal(p._replace(dot=p.dot).cosine, p.cosine)
    cloned = torch.utils._pytree.tree_map(torch.clone, p)
    assert torch.equal(cloned.global_cosine, p.global_cosine)


def test_mixed_dtypes_in_one_list():
    xs = [cases.gaussian(100, dtype=d) for d in cases.DTYPES]
    assert_close(ops.moments(xs).l2, torch.stack([x.double().norm() for x in xs]), 1e-5)
    pair = ops.pair_moments(xs[:2], [xs[0] * 2, xs[1].float()])
    assert_close(pair.cosine, torch.ones(2), 1e-6)


def test_empty_list():
    assert ops.moments([]).l2.shape == (0,)
    assert ops.moments([]).global_l2 == 0
    assert ops.pair_moments([], []).dot.shape == (0,)


@pytest.mark.slow
@pytest.mark.parametrize("row", rows("moments")[:1])
def test_more_elements_than_32_bits_count(row):
    x = torch.zeros(2**31 + 8, dtype=torch.bfloat16)
    x[-1] = 3
    with force(row):
        m = ops.moments(x)
    assert m.numel.item() == 2**31 + 8
    assert m.zeros.item() == 2**31 + 7
    assert m.l2.item() == 3


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.moments(torch.arange(3)), TypeError, "floating-point"),
        (lambda: ops.moments([1.0]), TypeError, "wants tensors"),
        (
            lambda: ops.moments(torch.eye(3).to_sparse()),
            TypeError,
            "dense tensors, got layout torch.sparse_coo",
        ),
        (lambda: ops.moments(torch.ones(2), order=3), ValueError, "order is 2 or 4"),
        (lambda: ops.pair_moments([torch.ones(2)], []), ValueError, "one length"),
        (lambda: ops.pair_moments(torch.ones(2), torch.ones(3)), ValueError, "one shape"),
        (lambda: ops.moments([torch.ones(2), torch.ones(2, device="meta")]), ValueError, "one device"),
        (lambda: ops.moments(torch.ones(2)).kurtosis, ValueError, "order=4"),
    ],
)
def test_bad_input_says_what_came(call, error, words):
    with pytest.raises(error, match=words):
        call()
