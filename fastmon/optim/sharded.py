"""Parameters sharded over ranks (DTensor): gather a matrix, slice the result back. Plain tensors pass through.

Newton-Schulz needs the whole matrix, so every rank gathers it and computes the same factor: one all-gather a matrix, no
communication on the way back. torch.distributed is imported only when a sharded tensor shows up.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor


def is_sharded(t: Tensor) -> bool:
    """Whether t is a DTensor."""
    return hasattr(t, "placements") and hasattr(t, "device_mesh")


def local(t: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; a plain tensor itself, detached."""
    whole: Any = t.detach()
    return cast(Tensor, whole.to_local()) if is_sharded(whole) else t.detach()


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor from every rank's part, sharded as `like` is. A collective."""
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    whole = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole.full_tensor()


def sliced(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank holds whole; no communication."""
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(like, DTensor)
    mesh = like.device_mesh
    replica = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replica.redistribute(mesh, like.placements).to_local()
