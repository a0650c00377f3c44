"""Muon: torch.optim.Muon's steps within bf16 noise, and what it adds: stacks, splits, tensors for lr, observations."""

import copy
import importlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fastmon import ops
from fastmon.optim import Muon
from tests import cases
from tests.compare import assert_close, assert_equal, bits

muon_module = importlib.import_module("fastmon.optim.muon")
SHAPES = [(96, 32), (32, 32), (128, 32), (32, 128), (32, 32), (1, 40), (40, 1)]


def parameters(shapes, dtype=torch.float32):
    return [torch.nn.Parameter(cases.gaussian(*s, dtype=dtype, scale=0.1)) for s in shapes]


def clones(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def train(optimizer, params, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def same_compute(monkeypatch, dtype):
    """Both sides orthogonalise by ops.newton_schulz in `dtype`, so that only the optimizers differ."""
    torch_module = importlib.import_module("torch.optim._muon")

    def orthogonalise(grad, coefficients, steps, eps):
        return ops.newton_schulz(grad, compute_dtype=dtype, steps=steps, out_dtype=torch.float32)

    def ours(*args, **kwargs):
        return ops.newton_schulz(*args, compute_dtype=dtype, **kwargs)

    monkeypatch.setattr(torch_module, "_zeropower_via_newtonschulz", orthogonalise)
    monkeypatch.setattr(muon_module, "newton_schulz", ours)


OPTIONS = [
    {},
    {"nesterov": False},
    {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"},
    {"adjust_lr_fn": "original", "momentum": 0.8, "ns_steps": 3},
    {"ns_coefficients": (2.0, -1.5, 0.5)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_torch_within_bf16_noise(options):
    start = parameters(SHAPES)
    ours, theirs = clones(start), clones(start)
    train(Muon(ours, lr=0.02, **options), ours, 10)
    train(torch.optim.Muon(theirs, lr=0.02, **options), theirs, 10)
    for a, b, s in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() <= 0.02 * (b - s).norm(), tuple(s.shape)


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_equals_torch_exactly_but_for_newton_schulz(options, monkeypatch):
    same_compute(monkeypatch, torch.float32)
    start = parameters(SHAPES)
    ours, theirs = clones(start), clones(start)
    train(Muon(ours, lr=0.02, **options), ours, 10)
    train(torch.optim.Muon(theirs, lr=0.02, **options), theirs, 10)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, 1e-5, 1e-6)


def test_bf16_parameters_and_the_momentum_buffer():
    """torch 2.13 normalises a bf16 buffer in place without Nesterov; here it stays the average of the gradients."""
    for nesterov in (False, True):
        params = parameters([(24, 16), (16, 24)], torch.bfloat16)
        optimizer = Muon(params, lr=0.01, momentum=0.5, nesterov=nesterov)
        want = [torch.zeros_like(p) for p in params]
        generator = torch.Generator().manual_seed(3)
        for _ in range(4):
            for p, w in zip(params, want, strict=True):
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
                w.lerp_(p.grad, 0.5)
            optimizer.step()
            for p, w in zip(params, want, strict=True):
                assert_equal(optimizer.state[p]["momentum_buffer"], w)


@pytest.mark.parametrize("norms", [False, True])
def test_two_runs_are_bitwise_equal_and_observing_changes_nothing(norms):
    start = parameters(SHAPES)
    first, second = clones(start), clones(start)
    train(Muon(first, lr=0.02), first, 5)
    watched = Muon(second, lr=0.02)
    watched.observe(norms=norms, spectrum=norms)
    train(watched, second, 5)
    for a, b in zip(first, second, strict=True):
        assert_equal(a, b)


def test_gradients_are_not_written():
    params = parameters(SHAPES)
    optimizer = Muon(params)
    train(optimizer, params, 1)
    before = bits([p.grad for p in params])
    optimizer.step()
    for now, then in zip(bits([p.grad for p in params]), before, strict=True):
        assert torch.equal(now, then)


def test_a_stack_equals_its_matrices_and_a_filter_its_flat_view():
    stack, filters = parameters([(3, 24, 16), (8, 3, 5, 5)])
    apart = [torch.nn.Parameter(m.detach().clone()) for m in stack]
    flat = torch.nn.Parameter(filters.detach().clone().flatten(1))
    together, single = Muon([stack, filters], lr=0.1), Muon([*apart, flat], lr=0.1)
    for seed in range(4):
        torch.manual_seed(seed)
        stack.grad, filters.grad = torch.randn_like(stack), torch.randn_like(filters)
        for p, g in zip([*apart, flat], [*stack.grad, filters.grad.flatten(1)], strict=True):
            p.grad = g.clone()
        together.step()
        single.step()
    assert_equal(stack.detach(), torch.stack([p.detach() for p in apart]))
    assert_equal(filters.detach().flatten(1), flat.detach())


@pytest.mark.parametrize("shape", [(48, 16), (2, 48, 16)], ids=str)
@pytest.mark.parametrize("rule", ["original", "match_rms_adamw"])
def test_split_equals_separate_parameters(shape, rule):
    fused = parameters([shape])[0]
    dim = len(shape) - 2
    apart = [torch.nn.Parameter(m.detach().clone()) for m in fused.chunk(3, dim)]
    one = Muon([{"params": [fused], "split": 3}], lr=0.1, adjust_lr_fn=rule)
    three = Muon(apart, lr=0.1, adjust_lr_fn=rule)
    for seed in range(4):
        torch.manual_seed(seed)
        fused.grad = torch.randn_like(fused)
        for p, g in zip(apart, fused.grad.chunk(3, dim), strict=True):
            p.grad = g.clone()
        one.step()
        three.step()
    assert_equal(fused.detach(), torch.cat([p.detach() for p in apart], dim))
    whole = parameters([shape])[0]
    whole.data.copy_(fused.data)
    before = whole.detach().clone()
    whole.grad = fused.grad
    Muon([whole], lr=0.1).step()
    assert not torch.equal(whole - before, fused - before)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_as_learning_rate_and_schedules(shape):
    start = parameters(SHAPES)
    floats, tensors = clones(start), clones(start)
    plain = Muon(floats, lr=0.02)
    rate = torch.full(shape, 0.02)
    scheduled = Muon(tensors, lr=rate)
    for step in range(4):
        plain.param_groups[0]["lr"] = 0.02 / (step + 1)
        plain.param_groups[0]["momentum"] = scheduled.param_groups[0]["momentum"] = 0.9 + step / 100
        rate.fill_(0.02 / (step + 1))
        train(plain, floats, 1, seed=step)
        train(scheduled, tensors, 1, seed=step)
    for a, b in zip(floats, tensors, strict=True):
        assert_close(a, b, 1e-5, 1e-6)
    scheduler = torch.optim.lr_scheduler.StepLR(plain, 1, 0.5)
    now = plain.param_groups[0]["lr"]
    train(plain, floats, 1)
    scheduler.step()
    assert plain.param_groups[0]["lr"] == now / 2


@pytest.mark.parametrize("source", [Muon, torch.optim.Muon])
def test_state_dict_continues(source):
    """Bit for bit from our own; from torch's, with the buffers and the options it has."""
    params = parameters(SHAPES)
    first = source(params, lr=0.03, momentum=0.9)
    train(first, params, 3)
    copied = clones(params)
    second = Muon(copied, lr=1.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["lr"] == 0.03
    for p, q in zip(params, copied, strict=True):
        assert_equal(first.state[p]["momentum_buffer"], second.state[q]["momentum_buffer"])
    start = clones(params)
    train(first, params, 3, seed=7)
    train(second, copied, 3, seed=7)
    for p, q, s in zip(params, copied, start, strict=True):
        if source is Muon:
            assert_equal(p, q)
        else:
            assert (p - q).norm() <= 0.02 * (q - s).norm()


def test_zero_and_missing_gradients():
    silent, zero, live = parameters([(8, 8), (8, 8), (8, 8)])
    before = [p.detach().clone() for p in (silent, zero, live)]
    optimizer = Muon([silent, zero, live], lr=0.1, weight_decay=0.0)
    optimizer.observe()
    zero.grad, live.grad = torch.zeros_like(zero), torch.randn_like(live)
    optimizer.step()
    assert_equal(silent.detach(), before[0])
    assert_equal(zero.detach(), before[1])
    assert not torch.equal(live.detach(), before[2])
    assert silent not in optimizer.state
    seen = optimizer.observations()
    assert silent not in seen
    assert seen[zero]["update_norm"] == 0
    assert Muon(parameters([(2, 2)])).step(lambda: 3.0) == 3.0


def test_a_nan_gradient_poisons_its_own_matrix_alone():
    params = parameters([(8, 8)] * 3)
    optimizer = Muon(params)
    for p in params:
        p.grad = torch.randn_like(p)
    params[1].grad[2, 3] = torch.nan
    optimizer.step()
    assert params[1].isnan().all()
    assert params[0].isfinite().all()
    assert params[2].isfinite().all()


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_observations_are_the_numbers(split, as_tensor):
    params = parameters([(32, 16), (32, 16), (4, 8, 12), (16, 64)])
    rate = torch.tensor(0.05) if as_tensor else 0.05
    optimizer = Muon(params, lr=rate, weight_decay=0.3, split=split)
    assert optimizer.observations() == {}
    optimizer.observe(spectrum=True)
    before = [p.detach().clone() for p in params]
    train(optimizer, params, 1)
    for p, then in zip(params, before, strict=True):
        seen = optimizer.observations()[p]
        assert all(v.ndim == 0 and v.dtype == torch.float32 for v in seen.values())
        assert_close(seen["update_norm"], (p.detach() - then).norm(), 1e-4)
        assert_close(seen["param_norm"], then.norm(), 1e-5)
        buffer = optimizer.state[p]["momentum_buffer"]
        update = p.grad.lerp(buffer, 0.95).double()
        pieces = update.chunk(split, dim=update.ndim - 2)
        matrices = [m for piece in pieces for m in piece.reshape(-1, *piece.shape[-2:])]
        tops = torch.stack([torch.linalg.svdvals(m)[0] for m in matrices])
        norms = torch.stack([m.norm() for m in matrices])
        assert_close(seen["update_spectral_norm"], tops.amax(), 5e-3)
        assert_close(seen["update_stable_rank"], ((norms / tops) ** 2).mean(), 1e-2)
    optimizer.observe(norms=False)
    train(optimizer, params, 1)
    assert optimizer.observations() == {}


def test_buckets_bound_the_batch_and_change_nothing(monkeypatch):
    start = parameters([(16, 8)] * 7)
    whole, parts = clones(start), clones(start)
    train(Muon(whole), whole, 2)
    monkeypatch.setitem(muon_module.BUCKET, "cpu", 300)
    for p in parts:
        p.grad = torch.zeros_like(p)
    assert [len(bucket) for bucket in muon_module._buckets(parts)] == [2, 2, 2, 1]
    train(Muon(parts), parts, 2)
    for a, b in zip(whole, parts, strict=True):
        assert_close(a, b, 1e-4, 1e-5)


def test_a_named_method():
    params = parameters([(12, 20)])
    start = params[0].detach().clone()
    optimizer = Muon(params, lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, method="polar-express")
    train(optimizer, params, 1)
    want = start - ops.newton_schulz(params[0].grad, method="polar-express")
    assert_close(params[0].detach(), want, 1e-6, 1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr is at least 0"),
        ({"lr": torch.ones(2)}, "one element"),
        ({"momentum": -0.1}, "momentum"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"eps": -1.0}, "eps"),
        ({"adjust_lr_fn": "best"}, "'original' or 'match_rms_adamw', got 'best'"),
        ({"ns_coefficients": (1.0, 2.0)}, "three numbers"),
        ({"ns_steps": 100}, "1 to 99"),
        ({"split": 0}, "split"),
        ({"split": 3}, r"split 3 does not divide the 8 rows"),
        ({"method": "ns9"}, "ns5, ns3, polar-express"),
    ],
    ids=str,
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        Muon(parameters([(8, 8)]), **options)


def test_bad_parameters():
    with pytest.raises(ValueError, match=r"matrices .* shape \(8,\)"):
        Muon([torch.nn.Parameter(torch.ones(8))])
    with pytest.raises(TypeError, match="complex"):
        Muon([torch.nn.Parameter(torch.ones(8, 8, dtype=torch.complex64))])
    optimizer = Muon(parameters([(8, 8)]))
    with pytest.raises(ValueError, match="shape"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    assert len(optimizer.param_groups) == 1
    p = parameters([(8, 8)])[0]
    p.grad = torch.eye(8).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        Muon([p]).step()


def _sharded_rank(rank, world, path, shapes):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    try:
        mesh = init_device_mesh("cpu", (world,))
        torch.manual_seed(0)
        plain = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
        places = [[Shard(0)], [Shard(1)], [Replicate()], [Shard(0)]]
        spread = [
            torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, place))
            for p, place in zip(plain, places, strict=True)
        ]
        one, many = Muon(plain, lr=0.1, split=2), Muon(spread, lr=0.1, split=2)
        for _ in range(3):
            for p, q in zip(plain, spread, strict=True):
                p.grad = torch.randn(p.shape)
                q.grad = distribute_tensor(p.grad.clone(), mesh, q.placements)
            one.step()
            many.step()
        for p, q in zip(plain, spread, strict=True):
            torch.testing.assert_close(q.detach().full_tensor(), p.detach(), rtol=1e-5, atol=1e-6)
    finally:
        dist.destroy_process_group()


def test_sharded_parameters_equal_whole_ones(tmp_path):
    mp.spawn(_sharded_rank, args=(2, tmp_path / "store", [(12, 8), (8, 12), (8, 8), (14, 4)]), nprocs=2)
