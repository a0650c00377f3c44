"""Mean cross-entropy of a language model's head, without holding the logits.

With 8,192 words and a narrow model the logits are the largest tensor of the step by far: 4,096 tokens x 8,192
words x 4 bytes = 128 MiB, which the plain path writes and reads about six times (logits, log-softmax, its
gradient). Here the rows are taken a chunk at a time: logits, their log-sum-exp, and at once the gradient
softmax - onehot, overwritten in place, multiplied back into x and w. Nothing of width `vocab` outlives its
chunk, and the backward pass only scales two finished gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# fp32 logits of one chunk: on a CPU small enough for the last-level cache, elsewhere large enough for full matmuls.
CHUNK_BYTES = {"cpu": 8 << 20}
CHUNK_BYTES_ELSEWHERE = 512 << 20


class _NextTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (N, dim)
        w: Tensor,  # (vocab, dim), compute dtype
        targets: Tensor,  # (N,) int64
        softcap: float,
        rows: int,
    ) -> Tensor:
        n = x.shape[0]
        need_x, need_w = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x) if need_x else None
        dw = torch.zeros_like(w, dtype=torch.float32) if need_w else None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for lo in range(0, n, rows):
            xs, ts = x[lo : lo + rows], targets[lo : lo + rows, None]
            z = (xs @ w.t()).float()  # (rows, vocab)
            if softcap:
                z = z.div_(softcap).tanh_().mul_(softcap)
            zt = z.gather(1, ts)
            peak = z.amax(dim=1, keepdim=True)
            capped = z.clone() if softcap and (need_x or need_w) else None
            p = z.sub_(peak).exp_()
            mass = p.sum(dim=1, keepdim=True)
            total += (mass.log() + (peak - zt)).sum()  # peak first: large logits cancel exactly
            if not (need_x or need_w):
                continue
            p.mul_(mass.reciprocal_())
            p.scatter_add_(1, ts, torch.full_like(zt, -1.0))
            if capped is not None:  # d cap tanh(z / cap) / dz = 1 - tanh^2
                p.mul_(capped.div_(softcap).square_().neg_().add_(1.0))
            g = p.to(x.dtype)
            if dx is not None:
                torch.mm(g, w, out=dx[lo : lo + rows])
            if dw is not None:
                if g.dtype == torch.float32:
                    dw.addmm_(g.t(), xs)
                else:
                    dw += g.t() @ xs
        ctx.save_for_backward(dx, dw)
        ctx.rows = n
        return total / n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # The mean's 1/n comes last, with the loss scale in `g`: alone it would push fp16 gradients under 6e-8.
        dx, dw = ctx.saved_tensors
        g = grads[0] / ctx.rows
        return None if dx is None else (dx * g).to(dx.dtype), None if dw is None else dw * g, None, None, None


def next_token_loss(
    x: Tensor,  # (..., dim)
    w: Tensor,  # (vocab, dim)
    targets: Tensor,  # (...) int64
    *,
    softcap: float = 0.0,
) -> Tensor:
    """Return mean(-log softmax(x w^T)[target]), 0-d fp32.

    Matmuls run in autocast's dtype where it is on, else in x's; the softmax, the sum and w's gradient are
    fp32. Differentiable once. Cost: the three matmuls of the head and about four passes over each chunk of logits.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        rows = max(1, CHUNK_BYTES.get(device, CHUNK_BYTES_ELSEWHERE) // (4 * w.shape[0]))
        loss: Tensor = _NextTokenLoss.apply(flat, w.to(dtype), targets.reshape(-1), softcap, rows)
        return loss
