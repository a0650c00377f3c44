"""Moments and pair moments against fp64 torch."""

import pytest
import torch
from torch import Tensor

from fastmon.kernels import moments, pair_moments, pointers
from tests.compare import assert_close, assert_equal, assert_unwritten, bits
from tests.kernels.conftest import DEVICE, INF, NAN


def values() -> dict[str, Tensor]:
    """Inputs by name: sizes around the tile and chunk borders, both kinds of alignment, three dtypes."""
    return {
        "one": torch.tensor([-2.0]),
        "empty": torch.empty(0),
        "odd": torch.randn(37),
        "tile": torch.randn(moments.CHUNK // 32),
        "two chunks": torch.randn(moments.CHUNK + 3),
        "large mean": torch.randn(20_000) + 1e4,
        "unaligned": torch.randn(5001)[1:],
        "bf16": torch.randn(5003).bfloat16(),
        "fp16": torch.randn(4099).half(),
        "bf16 unaligned": torch.randn(4200).bfloat16()[3:],
        "zeros": torch.zeros(100),
        "some zeros": torch.randn(3000).relu(),
        "tiny": torch.randn(3000) * 1e-30,
        "huge": torch.randn(3000) * 1e30,
        "tiny and huge": torch.cat([torch.randn(70_000) * 1e-30, torch.randn(10) * 1e25]),
        "nan": torch.tensor([1.0, NAN, 0.0]),
        "inf": torch.tensor([INF, -INF, 0.0, 1.0]),
    }


def moments_in_fp64(x: Tensor, order: int) -> tuple[list[int], Tensor]:
    x = x.double().flatten()
    counts = [x.numel(), int((x == 0).sum()), int((~x.isfinite()).sum())]
    n = 7 if order == 2 else 9
    if counts[2]:
        return counts, torch.full((n,), NAN, dtype=torch.float64)
    if not counts[0]:
        return counts, torch.tensor([0, 0, 0, INF, -INF, 0, 0, 0, 0][:n], dtype=torch.float64)
    d = x - x.mean()
    stats = [x.mean(), d.square().sum(), x.square().sum(), x.min(), x.max(), x.abs().max(), x.norm()]
    return counts, torch.stack([*stats, d.pow(3).sum(), d.pow(4).sum()][:n])


@pytest.mark.parametrize("order", [2, 4])
def test_moments(order):
    named = values()
    xs = [x.to(DEVICE) for x in named.values()]
    before = bits(xs)
    counts, stats = moments.launch(xs, order)
    assert counts.dtype == torch.int64
    assert stats.dtype == torch.float32
    for i, (name, x) in enumerate(named.items()):
        expected_counts, expected = moments_in_fp64(x, order)
        assert counts[:, i].tolist() == expected_counts, name
        got, expected = stats[:, i].double().cpu(), expected.float().double()  # as stored: may be 0 or inf
        scale = expected.abs()
        if x.numel() and not expected_counts[2]:
            # Odd sums cancel: their error is measured against the sum of absolute values.
            d = (x.double() - x.double().mean()).abs()
            scale[0], scale[1] = x.double().abs().mean(), scale[1] + 1e-45
            if order == 4:
                scale[7] = (d**3).sum()
        same = (got == expected) | (got.isnan() & expected.isnan())
        wrong = ~same & ~((got - expected).abs() <= 2e-6 * scale + 1e-44)
        assert not wrong.any(), f"{name}: {got} {expected}"
    assert_unwritten(xs, before)


def test_moments_do_not_depend_on_the_list_and_repeat_bit_for_bit():
    xs = [x.to(DEVICE) for x in values().values()]
    together = moments.launch(xs, 4)
    again = moments.launch(xs, 4)
    assert_equal(together[1], again[1], "two calls")
    for i in (2, 6, 7, 12):
        assert_equal(moments.launch([xs[i]], 4)[1][:, 0], together[1][:, i], f"alone {i}")


def test_moments_of_nothing():
    counts, stats = moments.launch([], 4)
    assert counts.shape == (3, 0)
    assert stats.shape == (9, 0)
    assert moments.launch([torch.empty(0, 3, device=DEVICE)], 2)[0].tolist() == [[0], [0], [0]]


def test_moments_in_the_middle_of_fp32s_range():
    # The squares of these lie near or below the smallest normal number, or their fourth powers do.
    for scale in (1e-13, 3e-20, 1e-7, 1e9, 3e18):
        x = torch.randn(3000) * scale
        stats = moments.launch([x.to(DEVICE)], 4)[1][:, 0].cpu()
        expected = moments_in_fp64(x, 4)[1]
        assert_close(stats[6], expected[6], rtol=1e-6, what=f"l2 at {scale}")
        assert_close(stats[8], expected[8].float(), rtol=1e-5, what=f"m4 at {scale}")


def test_pair_moments():
    named = values()
    xs = [x.to(DEVICE) for x in named.values()]
    noise = {name: torch.randn(x.shape).to(x.dtype) for name, x in named.items()}
    ys = [(x + noise[name] * x.abs()).to(DEVICE) for name, x in named.items()]
    ys[6] = ys[6].clone()  # one side aligned, the other not
    before = bits(xs + ys)
    out = pair_moments.launch(xs, ys)
    assert_equal(out, pair_moments.launch(xs, ys), "two calls")
    for i, name in enumerate(named):
        x, y = xs[i].double().cpu(), ys[i].double().cpu()
        norms = torch.stack([x.norm(), y.norm(), (x - y).norm()])
        expected = torch.stack(
            [x @ y, x @ x, y @ y, (x - y) @ (x - y), *norms, (x @ y) / norms[0] / norms[1]]
        )
        if not (x.isfinite().all() and y.isfinite().all()):
            expected = torch.full_like(expected, NAN)
        got = out[:, i].cpu()
        tolerance = torch.tensor([0, 3e-6, 3e-6, 3e-6, 2e-6, 2e-6, 2e-6, 0]) * expected.abs()
        tolerance[0], tolerance[7] = 2e-6 * norms[0] * norms[1], 2e-6
        wide = expected.float().double()
        same = (got.double() == wide) | (got.isnan() & wide.isnan())
        wrong = ~same & ~((got - expected).abs() <= tolerance + 1e-44)
        assert not wrong.any(), f"{name}: {got} {expected}"
    assert_unwritten(xs + ys, before)


def test_a_pair_with_one_non_finite_number_is_nan_as_a_whole():
    fine, bad = torch.tensor([1.0, 2.0], device=DEVICE), torch.tensor([INF, 1.0], device=DEVICE)
    out = pair_moments.launch([fine, bad, fine], [bad, fine, fine * NAN])
    assert out.isnan().all()


def test_pair_cosine_between_far_scales_and_of_equal_vectors():
    x = torch.randn(2000)
    xs = [v.to(DEVICE) for v in (x * 1e-30, x, x, torch.zeros(9))]
    ys = [v.to(DEVICE) for v in (x * 1e30, x, -x, torch.ones(9))]
    out = pair_moments.launch(xs, ys)
    assert_close(out[7].cpu(), torch.tensor([1.0, 1.0, -1.0, NAN]), rtol=1e-6)
    assert out[7].nan_to_num().abs().max() <= 1
    assert out[3, 1] == 0
    assert pair_moments.launch([], []).shape == (8, 0)


def test_tables_are_shared_by_equal_lists_and_replaced_when_tensors_move():
    device = torch.device(DEVICE)
    x, y = torch.randn(10, device=DEVICE), torch.randn(10, device=DEVICE)
    one, two = pointers.addresses([x]), pointers.addresses([y])
    table = pointers.resident(one, lambda: one, device)
    assert pointers.resident(one, lambda: pytest.fail("built twice"), device) is table
    assert pointers.resident(two, lambda: two, device).tolist() == [y.data_ptr()]
    layout = pointers.chunking((5, 0, moments.CHUNK + 1), ((torch.float32, True),) * 3, moments.CHUNK)
    assert layout.groups == (pointers.Group(torch.float32, True, 0, 3),)
    assert [t.tolist() for t in layout.tables(device)] == [[5, 0, moments.CHUNK + 1], [0, 1, 1], [0, 2, 2]]


def test_a_launch_takes_one_kernel_a_dtype_and_one_to_join(monkeypatch):
    launches = []
    original = type(moments.moments_chunks).run
    monkeypatch.setattr(
        type(moments.moments_chunks),
        "run",
        lambda self, *a, **k: (launches.append(self.fn.__name__), original(self, *a, **k))[1],
    )
    xs = [torch.randn(9, device=DEVICE) for _ in range(20)]
    moments.launch([*xs, *(x.bfloat16() for x in xs)], 2)
    assert launches == ["moments_chunks"] * 2 + ["moments_merge"]
