"""A frozen baseline: spectral norms the way training loops commonly compute them, one parameter at a time, in
eager torch.

Per matrix: five Newton-Schulz steps in bf16 for the polar factor Q, then seven power iterations v -> Q^T (W
v), and one `.item()`. It is kept exactly as it is, as a peer: never optimised, never imported by the package.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NS5 = (3.4445, -4.7750, 2.0315)  # Keller Jordan's Muon


@torch.no_grad()
def polar_factor(w: Tensor) -> Tensor:  # (m, n) -> (m, n)
    a, b, c = NS5
    x = w.to(torch.bfloat16)
    if w.shape[0] > w.shape[1]:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if w.shape[0] > w.shape[1] else x).to(torch.float32)


@torch.no_grad()
def spectral_norms(ws: Sequence[Tensor], power_iters: int = 7) -> list[float]:
    norms = []
    for w in ws:
        w = w.to(torch.float32)
        q = polar_factor(w)
        v = torch.ones(w.shape[1]) / w.shape[1] ** 0.5
        v = v.to(w.device)
        for _ in range(power_iters):
            v = q.T @ (w @ v)
            v = v / (v.norm() + 1e-12)
        norms.append((w @ v).norm().item())
    return norms
