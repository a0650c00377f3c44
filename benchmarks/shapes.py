"""Named lists of parameter shapes. A benchmark names one; nothing else in benchmarks/ types a size.

Weights are torch.nn.Linear's: (out features, in features).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Shape = tuple[int, ...]


def gpt2_hidden(*, layers: int = 12, dim: int = 768) -> tuple[Shape, ...]:
    """The hidden matrices of a GPT-2-shaped model: fused qkv, attention projection, MLP in and out, per
    block."""
    return ((3 * dim, dim), (dim, dim), (4 * dim, dim), (dim, 4 * dim)) * layers


def gpt2_124m() -> tuple[Shape, ...]:
    """All 148 parameters of GPT-2 124M as published: embeddings, norms with bias, linears with bias, tied
    head."""
    dim, vocab, context = 768, 50257, 1024
    block = ((dim,), (dim,), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,))
    block += ((dim,), (dim,), (4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,))
    return ((vocab, dim), (context, dim), *(block * 12), (dim,), (dim,))


SHAPES: dict[str, tuple[Shape, ...]] = {
    "gpt2-124m-hidden": gpt2_hidden(),  # 48 matrices, 84.9 M elements
    "gpt2-124m": gpt2_124m(),  # 148 tensors, 124.4 M elements, from 768 to 38.6 M each
    "gpt2-block": gpt2_hidden(layers=1),  # 4 matrices, 7.1 M elements: a quick stand-in for the 48
    "nano": ((8192, 128), *gpt2_hidden(layers=4, dim=128)),  # the default run's matrices, tied head
    "nano-hidden": gpt2_hidden(layers=4, dim=128),
    "tiny": ((1, 1), (3, 5), (17, 33), (64, 48), (48, 64)),  # for checks, not for timing
    "odd": ((1, 1), (1, 777), (777, 1), (4, 3001), (127, 129), (1000, 3), (63, 4097), (513, 511)),
    "many-small": ((768,),) * 1000 + ((16, 48),) * 1000,  # 2,000 tensors: host cost, not bandwidth
    "per-head": ((64, 768),) * 144,  # every attention head of 12 layers on its own
    "wide-4:1": ((3072, 768),),
    "wide-4:1-batch": ((3072, 768),) * 12,
    "wide-3:1": ((2304, 768),),
    **{f"square-{n}": ((n, n),) for n in (256, 512, 768, 1024, 2048, 4096)},
    "square-768-batch": ((768, 768),) * 12,
    "flat-85m": ((84_934_656,),),  # the 48 matrices' elements as one vector
}


def elements(name: str) -> int:
    """Number of elements over the whole named list."""
    return sum(math.prod(shape) for shape in SHAPES[name])


def packed(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    scale: float = 0.02,
) -> tuple[Tensor, list[Tensor]]:
    """Gaussian tensors of the named shapes, N(0, scale^2), as views of one flat buffer, each on a 64-byte
    line.

    Returns (flat, views). The seed's generator is its own; the padding between views is zero. A flat buffer
    of a multiple of 64 bytes can be viewed as fp32 in any dtype.
    """
    align = 64 // dtype.itemsize
    starts = [0]
    for shape in SHAPES[name]:
        starts.append(starts[-1] + -(-math.prod(shape) // align) * align)
    flat = torch.zeros(starts[-1], dtype=dtype, device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    views = []
    for start, shape in zip(starts, SHAPES[name], strict=False):
        view = flat[start : start + math.prod(shape)].view(shape)
        view.normal_(0, scale, generator=generator)
        views.append(view)
    return flat, views
