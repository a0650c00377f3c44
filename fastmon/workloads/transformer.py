"""The decoder-only transformer, shared by the language workloads.

The model follows modded-nanogpt (github.com/KellerJordan/modded-nanogpt): rotary positions, RMS-normalised
queries and keys, ReLU squared, no biases, the head tied to the embedding. Three ways to normalise are kept
apart because they are what the deep presets differ in:

- rmsnorm    x + f(norm(x)), norm without weights; the embedding and the final stream are normalised too;
- layernorm  x + f(LayerNorm(x)), with weight and bias, and a final LayerNorm (GPT-2);
- deepnorm   LayerNorm(alpha x + f(x)), after the sum, with the value and output matrices shrunk by beta at
             initialisation (arXiv 2203.00555): alpha = (2 L)^(1/4), beta = (8 L)^(-1/4) for a decoder of L
             blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmon.workloads.next_token_loss import next_token_loss
from fastmon.workloads.presets import Preset


def _linear(rows_in: int, rows_out: int) -> nn.Linear:
    # skip_init leaves torch's global generator alone; GPT draws every weight from its own.
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, rows_in, rows_out, bias=False)
    return layer


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last axis, without weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x, same shape and dtype."""
        return F.rms_norm(x, (x.shape[-1],))


class Rotary(nn.Module):
    """Rotary positions (arXiv 2104.09864), halves paired: (x1, x2) turn by t * base^(-i / half)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, seq_len: int, *, base: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"rotary needs an even head width, got {head_dim}")
        half = head_dim // 2
        angle = torch.outer(torch.arange(seq_len).double(), base ** (-torch.arange(half).double() / half))
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(
        self,
        x: Tensor,  # (batch, T, heads, head_dim)
    ) -> Tensor:
        """Turn each head's vector at position t; same shape and dtype. T may be below seq_len."""
        t = x.shape[1]
        cos, sin = self.cos[:t, None].to(x.dtype), self.sin[:t, None].to(x.dtype)  # (T, 1, half)
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)


class Attention(nn.Module):
    """Causal multi-head attention: q, k and v from one matrix, queries and keys RMS-normalised per head."""

    def __init__(self, row: Preset, seq_len: int) -> None:
        super().__init__()
        self.heads = row.heads
        self.qkv = _linear(row.dim, 3 * row.dim)
        self.proj = _linear(row.dim, row.dim)
        self.rotary = Rotary(row.head_dim, seq_len)

    def forward(
        self,
        x: Tensor,  # (B, T, dim)
    ) -> Tensor:
        """Return the attention output, (B, T, dim)."""
        b, t, dim = x.shape
        qkv = self.qkv(x).view(b, t, 3 * self.heads, dim // self.heads)
        qk, v = qkv.split((2 * self.heads, self.heads), dim=2)
        # q and k share their normalisation and rotation: one pass over 2 * heads heads.
        qk = self.rotary(F.rms_norm(qk, (qk.shape[-1],))).to(v.dtype)
        q, k = qk.transpose(1, 2).chunk(2, dim=1)  # (B, heads, T, head_dim) each
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(b, t, dim))
        return out


class MLP(nn.Module):
    """Up, ReLU squared (arXiv 2109.08668), down."""

    def __init__(self, row: Preset) -> None:
        super().__init__()
        self.fc = _linear(row.dim, row.ffn)
        self.proj = _linear(row.ffn, row.dim)

    def forward(
        self,
        x: Tensor,  # (B, T, dim)
    ) -> Tensor:
        """Return the MLP's output, (B, T, dim)."""
        out: Tensor = self.proj(F.relu(self.fc(x)).square())
        return out


class Block(nn.Module):
    """Attention and MLP around the residual stream, normalised as the preset says."""

    def __init__(self, row: Preset, seq_len: int) -> None:
        super().__init__()
        self.attn = Attention(row, seq_len)
        self.mlp = MLP(row)
        self.attn_norm, self.mlp_norm = _norm(row), _norm(row)
        self.alpha = (2 * row.layers) ** 0.25 if row.norm == "deepnorm" else None

    def forward(
        self,
        x: Tensor,  # (B, T, dim)
    ) -> Tensor:
        """Return the stream after this block, (B, T, dim)."""
        if self.alpha is not None:
            x = self.attn_norm(self.alpha * x + self.attn(x))
            return self.mlp_norm(self.alpha * x + self.mlp(x))  # type: ignore[no-any-return]
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


def _norm(row: Preset) -> nn.Module:
    return RMSNorm() if row.norm == "rmsnorm" else nn.LayerNorm(row.dim)


class GPT(nn.Module):
    """A decoder-only language model of one preset's shape.

    Weights are drawn on the CPU from `seed` alone, so that the model is the same on every device and rank and
    the caller's random state is untouched. `grad_checkpointing` keeps one activation a block and recomputes
    the rest in the backward pass: about a third more time for the memory.
    """

    def __init__(self, row: Preset, *, seq_len: int, seed: int, grad_checkpointing: bool = False) -> None:
        super().__init__()
        self.preset, self.grad_checkpointing = row, grad_checkpointing
        self.tok_emb = nn.utils.skip_init(nn.Embedding, row.vocab, row.dim)
        self.emb_norm = RMSNorm() if row.norm == "rmsnorm" else nn.Identity()
        self.blocks = nn.ModuleList(Block(row, seq_len) for _ in range(row.layers))
        # deepnorm's last block ends in a norm already.
        self.final_norm = nn.Identity() if row.norm == "deepnorm" else _norm(row)
        self.lm_head = _linear(row.dim, row.vocab)
        if row.tied:
            self.lm_head.weight = self.tok_emb.weight
        self._initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        row = self.preset

        def normal(w: Tensor, std: float) -> None:
            w.normal_(0.0, std, generator=generator)

        normal(self.tok_emb.weight, 0.02)
        if not row.tied:
            normal(self.lm_head.weight, 0.02)
        for block in self.blocks:
            assert isinstance(block, Block)
            attn, mlp = block.attn, block.mlp
            if row.norm == "deepnorm":  # xavier with gain beta, but gain 1 for q and k
                beta = (8 * row.layers) ** -0.25
                qk, v = attn.qkv.weight.split((2 * row.dim, row.dim))
                normal(qk, row.dim**-0.5)
                normal(v, beta * row.dim**-0.5)
                normal(attn.proj.weight, beta * row.dim**-0.5)
                normal(mlp.fc.weight, beta * math.sqrt(2 / (row.dim + row.ffn)))
                normal(mlp.proj.weight, beta * math.sqrt(2 / (row.dim + row.ffn)))
            else:  # unit-variance branches in, output matrices shrunk so that 2 L of them add up to one
                for w in (attn.qkv.weight, mlp.fc.weight):
                    normal(w, row.dim**-0.5)
                for w in (attn.proj.weight, mlp.proj.weight):
                    normal(w, (2 * row.layers * w.shape[1]) ** -0.5)

    def hidden(
        self,
        tokens: Tensor,  # (B, T) int64
    ) -> Tensor:
        """Return the final normalised stream, (B, T, dim): what the head reads."""
        x = self.emb_norm(self.tok_emb(tokens))
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        out: Tensor = self.final_norm(x)
        return out

    def forward(
        self,
        tokens: Tensor,  # (B, T) int64
        targets: Tensor | None = None,  # (B, T) int64
    ) -> Tensor:
        """Return fp32 logits (B, T, vocab), or with `targets` the mean next-token loss, 0-d fp32.

        The loss path never holds all logits at once (next_token_loss); both agree to fp32 rounding.
        """
        x = self.hidden(tokens)
        if targets is not None:
            return next_token_loss(x, self.lm_head.weight, targets, softcap=self.preset.softcap)
        logits: Tensor = self.lm_head(x).float()
        cap = self.preset.softcap
        return cap * torch.tanh(logits / cap) if cap else logits
