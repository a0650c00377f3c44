"""Facts of the ranks, and the few collectives a run needs.

`torchrun` tells each process its place through the environment; a plain `python train.py` is the one-process
case of the same code. CPU tensors always travel through gloo, so that the host can agree on something (an
error, a signal) without making a device wait. There is no barrier anywhere: a rank that leaves closes its
connections, the others see an error and leave too, and torchrun stops the job.

Equal work: a step has `grad_accum` micro-batches in all, and rank r of R takes those with index r modulo R. With
the same flags, R processes therefore compute the losses of one process, up to the order of fp32 sums: within 1e-4
relative over the first steps of the small model (tests/test_distributed.py), growing as training amplifies it.
"""

import contextlib
import datetime
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmon.backend import BackendError

TIMEOUT = datetime.timedelta(minutes=5)  # a rank that waits longer for the others gives up with an error


T = TypeVar("T")


class Refused(ValueError):
    """What some rank could not do, in one sentence."""


@dataclass(frozen=True)
class Ranks:
    """Where this process stands: its global and node-local rank, how many there are, and its device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks to the console."""
        return self.rank == 0


def pick_device(wish: str, *, local_rank: int = 0) -> torch.device:
    """Return the device of a rank: `auto` takes CUDA, then MPS, then the CPU; `cuda` takes one device a rank.

    Raises ValueError, in one sentence, when the wished device is not here.
    """
    if wish == "auto":
        wish = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wish)
    except RuntimeError:
        raise ValueError(
            f"--device {wish!r} does not exist: choose auto, cpu, cuda, cuda:<index> or mps"
        ) from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = local_rank if device.index is None else device.index
        if index >= count:
            raise ValueError(f"--device {wish} wants CUDA device {index}, this machine has {count}")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps wants an Apple GPU, this machine has none")
    if device.type not in ("cpu", "mps"):
        raise ValueError(f"--device {wish!r} does not exist: choose auto, cpu, cuda, cuda:<index> or mps")
    return device


@contextlib.contextmanager
def process_group(wish: str, environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """Join the process group that torchrun describes, if it describes one, and leave it at the end.

    On the way out through an error the group is abandoned, not torn down together: whoever waits for this
    rank sees its connection close.
    """
    world_size = int(environment.get("WORLD_SIZE", "1"))
    rank, local_rank = int(environment.get("RANK", "0")), int(environment.get("LOCAL_RANK", "0"))
    ranks = Ranks(rank, local_rank, world_size, pick_device(wish, local_rank=local_rank))
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    if world_size == 1:
        yield ranks
        return
    if ranks.device.type == "mps":
        raise ValueError("several processes need --device cpu or cuda: MPS has no collectives")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo",
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
        device_id=ranks.device if ranks.device.type == "cuda" else None,
    )
    yield ranks
    for work in _under_way:  # the group must not go before its last sum has come
        work.wait()
    _under_way.clear()
    dist.barrier()  # nobody's connection closes under another's last message
    gc.collect()  # DDP wrappers hold the group in cycles: its threads must end before the interpreter does
    dist.destroy_process_group()


def all_reduce(flat: Tensor) -> Tensor:  # (n,), any device
    """Sum `flat` over the ranks in place and return it; with one process it is returned as it came."""
    if dist.is_initialized():
        dist.all_reduce(flat)
    return flat


def gather(fact: Any) -> list[Any]:
    """Return every rank's `fact` (a small picklable object), in the order of the ranks, on every rank."""
    if not dist.is_initialized():
        return [fact]
    facts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(facts, fact)
    return facts


def together(act: Callable[[], T]) -> T:
    """Do `act` on every rank and return its result; where it fails on one, no rank goes on.

    A ValueError, OSError or BackendError of any rank is raised on all of them as Refused, with the first rank's
    sentence, so that none is left waiting for the one that gave up.
    """
    result, wrong = None, None
    try:
        result = act()
    except OSError as error:
        wrong = f"{error.filename}: {error.strerror}" if error.strerror else str(error)
    except (ValueError, BackendError) as error:
        wrong = str(error)
    if wrong := next((one for one in gather(wrong) if one), None):
        raise Refused(wrong)
    return cast(T, result)


def wrap(module: nn.Module, ranks: Ranks) -> nn.Module:
    """Return `module` so that its backward pass averages gradients over the ranks (DistributedDataParallel).

    Buckets alias the gradients (`gradient_as_bucket_view`), so that no second copy of them exists. Parameters
    and buffers start as rank 0's.
    """
    if ranks.world_size == 1:
        return module
    index = [ranks.device.index] if ranks.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=index, gradient_as_bucket_view=True)


def accumulating(module: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[None]:
    """Return the context for one micro-batch: gradients travel in the `last` one's backward pass alone."""
    if isinstance(module, nn.parallel.DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


_under_way: list[dist.Work] = []  # what an agreement has started and nobody has waited for


class Agreement:
    """Whether any rank wants to stop, known to all of them at the same step and without waiting.

    A signal reaches the ranks at different steps, and a rank that left its loop alone would leave the others
    hanging in their next gradient reduction. So each step starts a sum of one int32 on the host and reads the
    sum that the step before it started: all ranks stop after the same step, one later than the first wish.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, dist.Work] | None = None

    def any(self, wish: bool) -> bool:
        """Pass this rank's wish, return whether any rank had it by the last step (one process: by now)."""
        if not dist.is_initialized():
            return wish
        before, self._pending = self._pending, None
        flag = torch.tensor([wish], dtype=torch.int32)
        work = dist.all_reduce(flag, async_op=True)
        assert work is not None
        self._pending = (flag, work)
        _under_way[:] = [work]
        if before is None:
            return False
        before[1].wait()
        return bool(before[0].any())
