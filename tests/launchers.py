"""Calls of the raw CPU launchers `fastmon_C`, and what their tests share."""

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 63, 64, 127, 4099, 70001)
SHAPES = ((5, 3), (300, 70), (64, 333), (1, 10), (10, 1), (1, 1), (4, 100), (700, 96), (37, 1030))


def moments(xs, order=2):
    counts = torch.full((3, len(xs)), -1, dtype=torch.int64)
    stats = torch.full((9 if order == 4 else 7, len(xs)), -1.0)
    torch.ops.fastmon_C.moments(xs, counts, stats, order)
    return counts, stats


def pair_moments(xs, ys):
    out = torch.full((8, len(xs)), -1.0)
    torch.ops.fastmon_C.pair_moments(xs, ys, out)
    return out


def padded(n):
    return (n + 15) // 16 * 16


def fresh_state(ws, block=1, seed=0):
    """Orthonormal start vectors and exponents 0; the vectors of a matrix as rows."""
    parts = []
    for w in ws:
        n = w.shape[1]
        q = torch.linalg.qr(torch.randn(n, block, generator=torch.Generator().manual_seed(seed)).double()).Q
        rows = torch.zeros(block, padded(n))
        rows[: q.shape[1], :n] = q.T.float()
        parts += [torch.zeros(16), rows.flatten()]
    return torch.cat(parts) if parts else torch.zeros(0)


def segments(state, ws, block=1):
    at, found = 0, []
    for w in ws:
        n = w.shape[1]
        end = at + 16 + block * padded(n)
        found.append((state[at], state[at + 16 : end].view(block, padded(n))[:, :n]))
        at = end
    return found


def spectral_norm(ws, state, iters=1):
    out = torch.full((3, len(ws)), -1.0)
    torch.ops.fastmon_C.spectral_norm(ws, state, out, iters)
    return out.double()


def lanczos(ws, state, iters=20):
    out = torch.full((3, len(ws)), -1.0)
    torch.ops.fastmon_C.lanczos(ws, state, out, iters)
    return out.double()


def assert_certified(ws, sigma, residual):
    for w, s, r in zip(ws, sigma, residual, strict=True):
        gap = (torch.linalg.svdvals(w.double()) - s).abs().min()
        assert gap <= r / 2**0.5 + 1e-6 * s, (tuple(w.shape), gap, r)


def matrix_of(spectrum, m, n):
    r = len(spectrum)
    u = torch.linalg.qr(torch.randn(m, r).double()).Q
    v = torch.linalg.qr(torch.randn(n, r).double()).Q
    return (u * torch.as_tensor(spectrum, dtype=torch.float64)) @ v.T
