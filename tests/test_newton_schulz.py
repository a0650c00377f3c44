"""newton_schulz: against fp64, against torch.optim.Muon's function, on hostile input, and where forms can explode."""

import functools
import importlib

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz as torch_muon

from fastmon import backend, ops
from fastmon.backend import OPS, Facts, force
from fastmon.ops import newton_schulz, symmetric
from tests import cases
from tests.compare import assert_close, assert_equal, assert_unwritten, bits

module = importlib.import_module("fastmon.ops.newton_schulz")
METHODS = module.METHODS
KELLER = METHODS["ns5"].coefficients[0]
BF16, FP32 = torch.bfloat16, torch.float32
ROWS = [
    r.name for r, why in backend.explain(OPS["newton_schulz"], Facts("cpu", frozenset({FP32}))) if not why
]
SMALL = [(48, 80), (80, 48), (64, 64)]
LARGE = [(512, 1536), (1536, 512), (768, 768)]  # the Gram form, and strips
FORMS = [(row, name, shape) for row in ROWS for name in METHODS for shape in SMALL]
FORMS += [("fused", "ns5", shape) for shape in LARGE]
WIDE = (512, 1536)  # the smallest shape of the Gram form


def spectra(k):
    i = torch.arange(1, k + 1, dtype=torch.float64)
    return {
        "power_0.5": i**-0.5,
        "power_1": i**-1,
        "power_2": i**-2,
        "log_1e-4": torch.logspace(0, -4, k, dtype=torch.float64),
        "log_1e-9": torch.logspace(0, -9, k, dtype=torch.float64),
        "rank_10": (i <= 10).double(),
        "half_zero": (i <= k // 2).double(),
    }


@functools.cache
def basis(m, n):
    """Orthonormal columns, drawn once a shape."""
    k = min(m, n)
    drawn = [torch.randn(side, k, dtype=torch.float64) for side in (m, n)]
    return tuple(torch.linalg.qr(a).Q for a in drawn)


def with_spectrum(m, n, s, method=None):
    """The fp64 matrix with singular values s; with a method, what its polynomials make of it."""
    u, v = basis(m, n)
    return (u * (s if method is None else polynomials(s, method))) @ v.T


def polynomials(s, method, steps=None):
    known = METHODS[method]
    s = s / (s.norm() * known.margin)
    for a, b, c in known.schedule(steps or known.steps):
        s = a * s + b * s**3 + c * s**5
    return s


def largest(x):
    """The largest singular value."""
    x = x.double()
    return torch.linalg.eigvalsh(x @ x.mT if x.shape[0] <= x.shape[1] else x.mT @ x)[-1].sqrt()


def exact(x, method="ns5", steps=None):
    """The polynomial in fp64 on the singular values, and nothing else."""
    if x.ndim > 2:
        return torch.stack([exact(m, method, steps) for m in x])
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return (u * polynomials(s, method, steps)) @ vh


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def torch_dense(x, method, dtype):
    """torch.optim.Muon's loop with the coefficients and the dtype of the call."""
    known = METHODS[method]
    x = x.float() if x.shape[0] <= x.shape[1] else x.float().T
    y = x.to(dtype)
    y = y / (y.norm() * known.margin)
    for a, b, c in known.schedule(known.steps):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y


def test_the_scalar_recursion_is_torchs():
    x = cases.gaussian(40, 60)
    want = x.double() / x.double().norm()
    for _ in range(5):
        gram = want @ want.T
        want = KELLER[0] * want + (KELLER[1] * gram + KELLER[2] * gram @ gram) @ want
    assert_close(exact(x), want, 1e-9, 1e-9)
    assert_close(torch_dense(x, "ns5", BF16), torch_muon(x, KELLER, 5, 1e-7), 0, 2e-2)


@pytest.mark.parametrize(
    ("row", "method", "shape", "dtype"),
    [(*form, dtype) for form in FORMS for dtype in (BF16, FP32) if dtype == BF16 or form[2] in SMALL],
    ids=str,
)
def test_error_is_at_most_twice_torchs(row, method, shape, dtype):
    """Twice, and 2.1 times for the Gram form on Gaussian matrices, where rounding of its small products adds up."""
    k = min(shape)
    edge = (k / max(shape)) ** 0.5
    gaussian = torch.linspace(1 + edge, 1 - edge + 1e-3, k, dtype=torch.float64)
    named = {"like_gaussian": gaussian, **spectra(k)}
    for name in ("like_gaussian", "power_0.5", "power_1", "log_1e-4"):
        x, want = with_spectrum(*shape, named[name]).float(), with_spectrum(*shape, named[name], method)
        with force(row):
            ours = error(newton_schulz(x, method=method, compute_dtype=dtype), want)
        theirs = torch_dense(x, method, dtype)
        theirs = error(theirs if shape[0] <= shape[1] else theirs.T, want)
        bound = 2.1 if min(shape) == 512 else 2.0
        assert ours <= bound * theirs + 1e-6, f"{name}: {ours:.2e} against torch's {theirs:.2e}"


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("method", METHODS)
def test_against_the_polar_factor(row, method):
    """ns3 reaches it; the others stay in their bands around it, as their coefficients say."""
    s = torch.linspace(1, 0.3, 40, dtype=torch.float64)
    x = cases.with_spectrum(40, 90, s)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    with force(row):
        got = newton_schulz(x.float(), method=method, compute_dtype=FP32).double()
    bound = {"ns5": 0.33, "ns3": 0.16, "polar-express": 0.15}[method]
    assert torch.linalg.matrix_norm(got - u @ vh, 2) < bound
    if method == "ns3":
        more = newton_schulz(x.float(), method="ns3", steps=20, compute_dtype=FP32)
        assert_close(more, u @ vh, 0, 1e-5)


@pytest.mark.parametrize(("row", "method", "shape"), FORMS, ids=str)
def test_output_bands_on_named_spectra(row, method, shape):
    """The largest output singular value stays within the method's band + 0.1, in bf16, in every form that is used."""
    top = {"ns5": 1.202, "ns3": 1.0, "polar-express": 1.141}[method] + 0.1
    xs = [with_spectrum(*shape, s).float() for s in spectra(min(shape)).values()]
    with force(row):
        factors = newton_schulz(xs, method=method, compute_dtype=BF16)
    for name, factor in zip(spectra(min(shape)), factors, strict=True):
        assert largest(factor) < top, name


@pytest.mark.parametrize("restart", [2, 3])
def test_the_gram_form_explodes_where_it_is_not_used(restart):
    """Why polar-express stays dense in bf16: its slope blows up what rounding leaves in the Gram matrix."""
    known = METHODS["polar-express"]
    worst = 0.0
    for s in spectra(256).values():
        x = with_spectrum(256, 1024, s)[None]
        x = (x / (x.norm() * known.margin)).to(BF16)
        y, _ = symmetric.gram(x, known.schedule(5), restart=restart, tall=False, probe=False)
        worst = max(worst, largest(y[0]).item())
    assert worst > 1.25
    assert known.restart is None


def test_the_gram_form_is_used_only_where_it_is_sound(monkeypatch):
    taken = []
    original = symmetric.gram
    monkeypatch.setattr(
        symmetric, "gram", lambda x, *a, **k: taken.append(tuple(x.shape)) or original(x, *a, **k)
    )
    newton_schulz(cases.gaussian(*WIDE), compute_dtype=BF16)
    assert taken == [(1, *WIDE)]
    newton_schulz(cases.gaussian(1536, 512), compute_dtype=BF16)
    assert len(taken) == 2
    newton_schulz(cases.gaussian(*WIDE), compute_dtype=FP32)
    newton_schulz(cases.gaussian(*WIDE), compute_dtype=BF16, steps=4)
    newton_schulz(cases.gaussian(*WIDE), compute_dtype=BF16, method="polar-express")
    newton_schulz(cases.gaussian(256, 1024), compute_dtype=BF16)
    newton_schulz(cases.gaussian(512, 1024), compute_dtype=BF16)
    assert len(taken) == 2


@pytest.mark.parametrize("rows", [768, 800, 1000])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_strips_are_the_full_product(rows, dtype):
    x = cases.gaussian(2, rows, 800, dtype=dtype)
    base = cases.gaussian(2, rows, rows, dtype=dtype)
    base = base + base.mT
    full = torch.bmm(x, x.mT)
    out = symmetric.square(x, out=torch.empty_like(base))
    assert_equal(out, out.mT.contiguous())
    assert_close(out, full, 1e-2 if dtype == BF16 else 1e-5, 1e-3)
    out = symmetric.square(x, out=torch.empty_like(base), base=base, beta=0.5, alpha=2.0)
    assert_close(out, 2 * full.float() + 0.5 * base.float(), 2e-2 if dtype == BF16 else 1e-5, 1e-2)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_hostile_matrices(row, method, dtype):
    named = cases.matrices(dtype) | {"empty": torch.empty(0, 5, dtype=dtype)}
    named["stack"] = cases.gaussian(3, 9, 20, dtype=dtype)
    named["filter"] = cases.gaussian(2, 3, 6, 4, dtype=dtype)  # a batch of 6 matrices, never reshaped
    xs = list(named.values())
    before = bits(xs)
    with force(row):
        got = newton_schulz(xs, method=method)
    assert_unwritten(xs, before)
    for (name, x), factor in zip(named.items(), got, strict=True):
        assert factor.shape == x.shape, name
        assert factor.dtype == dtype, name
        assert factor.is_contiguous(), name
        if x.numel() and name not in ("rank_one", "deficient", "expanded"):
            want = exact(x.reshape(-1, *x.shape[-2:]), method).reshape(x.shape)
            assert error(factor, want) < 0.05, name


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("method", METHODS)
def test_rank_one_stays_bounded(row, method):
    """All of the norm in one singular value: the normalised input is 1 (/ margin), the edge of every interval."""
    want = polynomials(torch.ones(1, dtype=torch.float64), method)
    for shape in ((40, 90), (90, 40), (1, 50), (50, 1), (1, 1), WIDE):
        x = cases.gaussian(shape[0], 1) @ cases.gaussian(1, shape[1])
        with force(row):
            got = largest(newton_schulz(x, method=method))
        assert abs(got - want) < 0.1, shape


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-8, 1e8, 1e20, 1e30])
def test_any_magnitude(row, scale):
    x = cases.gaussian(30, 50)
    with force(row):
        for dtype in (FP32, BF16):
            power = 2.0 ** round(torch.tensor(scale).log2().item())
            assert_equal(newton_schulz((x * power).to(dtype)), newton_schulz(x.to(dtype)), f"{scale} {dtype}")
        moments = newton_schulz(x * scale, return_moments=True)
    assert_close(moments.fro[0] / scale, x.double().norm(), 1e-5)
    assert_close(moments.sigma[0] / scale, torch.linalg.svdvals(x.double())[0], 5e-3)


@pytest.mark.parametrize("row", ROWS)
def test_zero_gives_zero_and_nan_stays_in_its_matrix(row):
    for shape in ((12, 20), (20, 12), WIDE):
        clean = [cases.gaussian(*shape) for _ in range(2)]
        with force(row):
            want = newton_schulz(clean)
            for poison in (torch.nan, torch.inf, -torch.inf):
                bad = cases.gaussian(*shape)
                bad[3, 4] = poison
                first, poisoned, zero, second = newton_schulz([clean[0], bad, torch.zeros(shape), clean[1]])
                assert poisoned.isnan().all()
                assert not zero.any()
                assert_equal(first, want[0])
                assert_equal(second, want[1])


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("shape", [(16, 24), (128, 384), (512, 128), WIDE], ids=str)
def test_batch_equals_loop(row, shape):
    xs = [cases.gaussian(*shape) for _ in range(3)]
    with force(row):
        together = newton_schulz(xs)
        stack = newton_schulz(torch.stack(xs))
        alone = [newton_schulz(x) for x in xs]
        again = newton_schulz(xs)
    for i in range(3):
        assert_close(together[i], alone[i], 0, 4e-3, "a batch may sum in another order than one matrix")
        assert_equal(stack[i], together[i])
        assert_equal(again[i], together[i], "two calls")


@pytest.mark.parametrize("row", ROWS)
def test_mixed_list_keeps_order_and_dtypes(row):
    xs = [
        cases.gaussian(8, 12),
        cases.gaussian(12, 8, dtype=BF16),
        cases.gaussian(8, 12, dtype=torch.float16),
    ]
    with force(row):
        got = newton_schulz(xs)
        wide = newton_schulz(xs, out_dtype=torch.float64, compute_dtype=torch.float64)
    for x, y, z in zip(xs, got, wide, strict=True):
        assert y.dtype == x.dtype
        assert z.dtype == torch.float64
        assert error(y, exact(x)) < 0.05
        assert_close(z, exact(x), 0, 1e-6)
    assert newton_schulz([]) == []


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(
    ("row", "shape"), [(row, shape) for row in ROWS for shape in SMALL] + [("fused", WIDE)], ids=str
)
def test_moments(row, dtype, shape):
    named = {"gaussian": cases.gaussian(*shape).double()}
    named |= {name: with_spectrum(*shape, s) for name, s in spectra(min(shape)).items()}
    xs = [x.float() for x in named.values()]
    with force(row):
        got = newton_schulz(xs, compute_dtype=dtype, return_moments=True)
        plain = newton_schulz(xs, compute_dtype=dtype)
    truth = torch.stack([largest(x) for x in xs])
    norms = torch.stack([x.double().norm() for x in xs])
    assert_close(got.fro, norms, 2e-6)
    assert_close(got.sigma, truth, 5e-3)
    assert_close(got.stable_rank, (norms / truth) ** 2, 1e-2)
    for factor, want in zip(got.factor, plain, strict=True):
        assert_equal(factor, want, "moments change nothing")


def test_moments_of_stacks_zeros_and_nan():
    stack = cases.gaussian(3, 10, 20)
    stack[1] = 0
    stack[2, 0, 0] = torch.nan
    got = newton_schulz([stack, torch.empty(0, 4)], return_moments=True)
    assert got.sigma.shape == (4,)
    assert_close(got.sigma[0], torch.linalg.svdvals(stack[0])[0], 5e-3)
    assert got.sigma[1] == 0
    assert got.stable_rank[1].isnan()
    assert got.sigma[2].isnan()
    assert got.sigma[3] == 0


def test_coefficients_of_your_own():
    x = cases.gaussian(20, 30)
    mine = module.Method((KELLER,), steps=5)
    assert_close(newton_schulz(x, method=mine), newton_schulz(x), 0, 5e-2)
    halley = module.Method(((1.875, -1.25, 0.375),), steps=12)
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    assert_close(newton_schulz(x, method=halley, compute_dtype=FP32), u @ vh, 0, 1e-4)


def test_the_compile_row_equals_the_reference():
    xs = [cases.gaussian(12, 20), cases.gaussian(12, 20), cases.gaussian(9, 4)]
    arguments = (xs, "ns5", 5, FP32, None)
    with force("compile"):
        compiled = OPS["newton_schulz"].prepare(*arguments)
    for got, want in zip(compiled(*arguments), module.reference(*arguments), strict=True):
        assert_close(got, want, 0, 1e-4)


def test_opcheck_and_fullgraph():
    xs = [cases.gaussian(6, 9), cases.gaussian(9, 6), cases.gaussian(2, 3, 4)]
    for op in (module.op, module.moments_op):
        torch.library.opcheck(op.overload, (xs, "ns5", 5, BF16, None))
        torch.library.opcheck(op.overload, (xs, "ns3", 2, FP32, torch.float64))

    def inside(x):
        return newton_schulz(x * 2).sum()

    x = cases.gaussian(8, 8)
    assert_close(torch.compile(inside, fullgraph=True, backend="aot_eager")(x), inside(x), 1e-5)


def test_results_carry_no_gradient_and_the_generator_is_untouched():
    x = cases.gaussian(8, 8).requires_grad_()
    before = torch.get_rng_state()
    assert not newton_schulz(x, return_moments=True).factor.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: newton_schulz(torch.ones(3)), ValueError, r"matrices .* got shape \(3,\)"),
        (lambda: newton_schulz(torch.ones(3, 3, dtype=torch.int64)), TypeError, "floating"),
        (lambda: newton_schulz(torch.ones(3, 3, dtype=torch.complex64)), TypeError, "floating"),
        (lambda: newton_schulz([torch.ones(3, 3), 3]), TypeError, "int at position 1"),
        (lambda: newton_schulz(torch.ones(3, 3), method="ns7"), ValueError, "ns5, ns3, polar-express, got 'ns7'"),
        (lambda: newton_schulz(torch.ones(3, 3), steps=0), ValueError, "from 1 to 99, got 0"),
        (lambda: newton_schulz(torch.ones(3, 3), compute_dtype=torch.float16), ValueError, "GPU"),
        (lambda: newton_schulz(torch.ones(3, 3), compute_dtype=torch.int8), ValueError, "compute_dtype"),
        (lambda: newton_schulz(torch.ones(3, 3), out_dtype=torch.int8), ValueError, "out_dtype"),
        (lambda: newton_schulz(torch.ones(3, 3), out_dtype="bf16"), TypeError, "torch.dtype .* got 'bf16'"),
        (lambda: newton_schulz(torch.ones(3, 3), compute_dtype="bf16"), TypeError, "compute_dtype .* got 'bf16'"),
        (lambda: newton_schulz([torch.ones(3, 3), torch.ones(3, 3, device="meta")]), ValueError, "device"),
    ],
)  # fmt: skip
def test_bad_arguments(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_the_default_dtype_follows_the_hardware(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "op", lambda xs, *rest: seen.append(rest[2]) or xs)
    for has, want in ((True, BF16), (False, FP32)):
        monkeypatch.setattr(module, "CPU_BF16", has)
        newton_schulz([torch.ones(2, 2)])
        assert seen[-1] == want
    assert isinstance(ops.newton_schulz(torch.ones(2, 2)), torch.Tensor)
