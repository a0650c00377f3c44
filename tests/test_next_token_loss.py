"""The chunked loss against cross-entropy in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F

import fastmon.workloads.next_token_loss as loss_room
from fastmon.workloads.next_token_loss import next_token_loss


def draw(*shape, vocab=61):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_chunked_loss_is_cross_entropy(monkeypatch, rows, softcap):
    monkeypatch.setitem(loss_room.CHUNK_BYTES, "cpu", 4 * 61 * rows)  # 48 tokens in chunks of `rows`
    x = torch.randn(3, 16, 32, requires_grad=True)
    w = torch.randn(61, 32, requires_grad=True)
    targets = draw(3, 16)
    got = next_token_loss(x, w, targets, softcap=softcap)
    (2.5 * got).backward()  # a scaled loss scales the gradients
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
    logits = x64 @ w64.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    wanted = F.cross_entropy(logits.reshape(-1, 61), targets.reshape(-1))
    (2.5 * wanted).backward()
    assert got.dtype == torch.float32
    assert got.shape == ()
    assert got.item() == pytest.approx(wanted.item(), rel=1e-6)
    for a, b in ((x.grad, x64.grad), (w.grad, w64.grad)):
        assert ((a - b).norm() / b.norm()).item() < 1e-6


def test_loss_survives_large_logits():
    x = torch.full((2, 4), 100.0, requires_grad=True)
    w = torch.eye(3, 4) * 100
    w[1] = -w[0]
    loss = next_token_loss(x, w, torch.tensor([0, 2]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)  # words 0 and 2 tie at 1e4
    assert torch.isfinite(x.grad).all()


def test_gradients_only_where_wanted():
    x, w = torch.randn(5, 4), torch.randn(7, 4, requires_grad=True)
    targets = draw(5, vocab=7)
    next_token_loss(x, w, targets).backward()
    assert x.grad is None
    assert w.grad is not None
    x.requires_grad_()
    next_token_loss(x, w.detach(), targets).backward()
    assert x.grad is not None
    with torch.no_grad():
        assert not next_token_loss(x, w, targets).requires_grad


def test_no_silent_second_derivative():
    x = torch.randn(5, 4, requires_grad=True)
    loss = next_token_loss(x, torch.randn(7, 4), draw(5, vocab=7))
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        g.sum().backward()


def test_small_fp16_gradients_survive_with_a_loss_scale():
    # 1 / n of a fresh softmax entry is below fp16's 6e-8; with the scale in front nothing is lost.
    n, vocab = 2048, 4096
    x, w = torch.randn(n, 8), torch.randn(vocab, 8) * 0.01
    targets = draw(n, vocab=vocab)
    grads = []
    for dtype in (torch.float16, torch.float64):
        a, b = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
        half = dtype == torch.float16
        loss = next_token_loss(a, b, targets) if half else F.cross_entropy(a @ b.T, targets)
        (loss * 65536).backward()
        grads.append((a.grad.double(), b.grad.double()))
    for got, wanted in zip(*grads, strict=True):
        assert ((got - wanted).norm() / wanted.norm()).item() < 5e-3
