"""A small model with dropout, tied embeddings and a fused qkv, its batches, and a sink that keeps rows."""

import math

import torch
import torch.nn.functional as F
from torch import nn

import fastmon


class Block(nn.Module):
    def __init__(self, d, p):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.proj = nn.Linear(d, d, bias=False)
        self.drop = nn.Dropout(p)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.drop(self.proj(mixed))


class Tiny(nn.Module):
    def __init__(self, d=16, vocab=29, layers=2, p=0.1):
        super().__init__()
        self.tok_emb = nn.Embedding(vocab, d)
        self.blocks = nn.ModuleList([Block(d, p) for _ in range(layers)])
        self.lm_head = nn.Linear(d, vocab, bias=False)
        self.lm_head.weight = self.tok_emb.weight

    def forward(self, tokens):
        x = self.tok_emb(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.lm_head(x[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def tokens(step, vocab=29):
    return torch.randint(0, vocab, (2, 12), generator=torch.Generator().manual_seed(step))


def split_optimizers(model, muon, adamw=torch.optim.AdamW):
    matrices = [p for n, p in model.named_parameters() if "blocks" in n and p.ndim == 2]
    others = [p for n, p in model.named_parameters() if not ("blocks" in n and p.ndim == 2)]
    return [muon(matrices, lr=1e-2), adamw(others, lr=1e-3)]


class Rows:
    """A sink that keeps what it gets."""

    def __init__(self):
        self.rows, self.closed = [], False

    def write(self, row):
        self.rows.append(row)

    def close(self):
        self.closed = True

    def __getitem__(self, index):
        return {**self.rows[index].values, **self.rows[index].params}


def watch(model, optimizer=None, **options):
    sink = Rows()
    return fastmon.Monitor(model, optimizer, sinks=[sink], **options), sink


def norm(tensors):
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))
