"""The `--mode` table: sizes of the language models, and what follows from sizes alone. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Norm = Literal["rmsnorm", "layernorm", "deepnorm"]


@dataclass(frozen=True)
class Preset:
    """One row of the `--mode` table: the sizes that fix every weight shape."""

    dim: int  # width of the residual stream
    layers: int  # blocks, each attention + MLP
    heads: int  # attention heads; dim / heads must be even (rotary turns pairs)
    ffn: int  # width of the MLP
    vocab: int  # rows of the embedding
    norm: Norm
    tied: bool = True  # the head is the embedding
    softcap: float = 0.0  # logits -> c tanh(logits / c); 0 is off

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.heads

    def widened(self, width: int) -> Preset:
        """The preset at another dim: heads keep their width, the MLP keeps its ratio to dim.

        Constant head width is what muP's transfer across width assumes (arXiv 2203.03466, appendix D).
        """
        if width <= 0 or width % self.head_dim:
            raise ValueError(f"width must be a positive multiple of the heads' {self.head_dim}, got {width}")
        return replace(self, dim=width, heads=width // self.head_dim, ffn=width * self.ffn // self.dim)

    def matmul_parameters(self) -> int:
        """Weights that a token is multiplied with: the blocks' matrices and the head, once."""
        return self.layers * (4 * self.dim**2 + 2 * self.dim * self.ffn) + self.vocab * self.dim

    def flops_per_token(self, seq_len: int) -> float:
        """Training FLOPs a token, 6 N + 12 L H Q T (PaLM, arXiv 2204.02311, appendix B).

        N counts matmul weights (the embedding only as the tied head), Q is the head width and T the sequence
        length; the causal half is not subtracted, as in the source, so that MFU compares with published ones.
        """
        return 6.0 * self.matmul_parameters() + 12.0 * self.layers * self.heads * self.head_dim * seq_len


PRESETS: dict[str, Preset] = {
    "nano": Preset(dim=128, layers=4, heads=4, ffn=512, vocab=8192, norm="rmsnorm"),
    "microscope": Preset(dim=384, layers=77, heads=6, ffn=1536, vocab=8192, norm="layernorm"),
    "deep_narrow_40": Preset(dim=768, layers=40, heads=12, ffn=3072, vocab=8192, norm="deepnorm"),
    "deep_narrow_48": Preset(dim=896, layers=48, heads=14, ffn=3584, vocab=8192, norm="deepnorm"),
    "gpt2-124m": Preset(dim=768, layers=12, heads=12, ffn=3072, vocab=50304, norm="rmsnorm"),
}


def preset(
    mode: str,
    *,
    width: int | None = None,
) -> Preset:
    """Look `mode` up in PRESETS, at `width` in place of its dim when given; ValueError on an unknown mode."""
    if mode not in PRESETS:
        raise ValueError(f"unknown mode {mode!r}; the modes are {', '.join(PRESETS)}")
    row = PRESETS[mode]
    return row.widened(width) if width else row
