"""Compile every Triton kernel for GPUs that are not here, and record what it takes: registers, spills,
shared memory.

    python benchmarks/aot.py            write benchmarks/results/aot.csv for all targets
    python benchmarks/aot.py sm_90      print one target's rows and write nothing

Each launcher is called on CPU tensors with `JITFunction.run` replaced by a recorder, so that what is
compiled is what would be launched: the launcher's own signature, constants, divisibility attributes, warps
and stages. Compiled with guessed attributes, another kernel comes out (scalar loads, spills) and the table
would describe that one.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

RESULTS = Path(__file__).parent / "results" / "aot.csv"

TARGETS: dict[str, GPUTarget] = {
    **{f"sm_{sm}": GPUTarget("cuda", sm, 32) for sm in (80, 89, 90, 100, 120)},
    **{gfx: GPUTarget("hip", gfx, 64) for gfx in ("gfx942", "gfx950")},
}

# Shared memory (LDS) a program may use, in bytes.
SHARED_LIMIT: dict[str, int] = {
    "sm_80": 166_912,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
    "gfx950": 163_840,
}

# Kernels that never see the inputs' dtype: they work on partial results.
DTYPE_FREE = ("moments_merge", "pair_merge", "gram_sum", "finish", "unpack", "pack", "top_eigenpair")

MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma", "mma.sync", "v_mfma")


@dataclass(frozen=True)
class Row:
    """One line of the table; `variant` tells apart two compilations of one kernel for one dtype."""

    kernel: str
    variant: str
    dtype: str
    target: str
    warps: int
    stages: int
    regs: int
    spills: int
    shared_bytes: int
    mma: str
    triton: str


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel and the arguments that decide what is compiled."""

    kernel: JITFunction[Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: str
    variant: str


def name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


@contextmanager
def recording(target: str) -> Iterator[list[tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]]]:
    """Collect launches instead of making them; launchers believe that they run on `target`."""
    from fastmon.kernels import pointers

    taken: list[tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]] = []

    def record(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        taken.append((self, args, kwargs))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(pointers, "arch", return_value=target),
    ):
        yield taken


def moments_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    from fastmon.kernels import moments, pair_moments

    x = torch.zeros(4096, dtype=dtype)
    for order in (2, 4):
        yield f"order {order}", lambda order=order: moments.launch([x], order)
    yield "order 2 unaligned", lambda: moments.launch([x[1:]], 2)
    yield "", lambda: pair_moments.launch([x], [x])
    yield "unaligned", lambda: pair_moments.launch([x[1:]], [x[1:]])


def newton_schulz_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    from fastmon.kernels import newton_schulz

    for side in (256, 768):
        for shape in ((side, 1024), (1024, side)):
            x = torch.zeros(shape, dtype=dtype)
            name = "x".join(map(str, shape))
            yield name, lambda x=x: newton_schulz.launch([x], "ns5", 2, dtype, dtype)
    odd = torch.zeros(250, 333, dtype=dtype)
    yield "250x333", lambda: newton_schulz.launch([odd], "ns5", 2, dtype, dtype)


def spectral_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    from fastmon.kernels import spectral

    for columns in (768, 3072, 5120):
        w = torch.zeros(64, columns, dtype=dtype)
        state = torch.zeros(16 + columns)
        yield f"n={columns}", lambda w=w, state=state: spectral.spectral_norm([w], state, 1)
    narrow = torch.zeros(64, 769, dtype=dtype)[:, 1:]
    yield "n=768 unaligned", lambda: spectral.spectral_norm([narrow], torch.zeros(784), 1)
    wide = torch.zeros(64, 5121, dtype=dtype)[:, 1:]
    yield "n=5120 unaligned", lambda: spectral.spectral_norm([wide], torch.zeros(5136), 1)
    w = torch.zeros(64, 768, dtype=dtype)
    state = torch.zeros(784)
    halves = torch.zeros(768), torch.zeros(1, 1, 1), torch.zeros(1)
    yield "half", lambda: spectral.gram_matvec([w], state)
    yield "summed", lambda: spectral.spectral_finish(*halves, state, [768])
    yield "20 steps", lambda: spectral.lanczos([w], state, 20)


CASES: tuple[Callable[[torch.dtype], Iterator[tuple[str, Callable[[], object]]]], ...] = (
    moments_cases,
    newton_schulz_cases,
    spectral_cases,
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def launches(target: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[Launch]:
    """Return the distinct launches of every case on a target."""
    found: dict[str, Launch] = {}
    for cases in CASES:
        for dtype in dtypes:
            for variant, call in cases(dtype):
                with recording(target) as taken:
                    call()
                for kernel, args, kwargs in taken:
                    _, signature, constexprs, attrs = specialise(kernel, args, kwargs, TARGETS[target])
                    # A kernel that never sees the dtype is the same for all of them and is listed once.
                    name = kernel.fn.__name__
                    key = repr((name, signature, constexprs, attrs))
                    flags = [flag.lower() for flag in ("ADD", "TABLE") if kwargs.get(flag)]
                    label = " ".join([variant, *flags]).strip()
                    found.setdefault(
                        key,
                        Launch(kernel, args, kwargs, "any" if name in DTYPE_FREE else name_of(dtype), label),
                    )
    return list(found.values())


def specialise(
    kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any], target: GPUTarget
) -> tuple[Any, dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Return (options, signature, constants, attributes) as Triton derives them from a launch's arguments."""
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **{"debug": False, **kwargs})
    packed: tuple[Any, dict[str, str], dict[Any, Any], dict[Any, Any]] = kernel._pack_args(
        backend, {"debug": False, **kwargs}, bound, specialization, options
    )
    return packed


def compile_launch(launch: Launch, target: str) -> tuple[Row, dict[str, Any]]:
    """Compile one launch; return its row and the generated texts ("ptx" or "amdgcn" among them)."""
    options, signature, constexprs, attrs = specialise(
        launch.kernel, launch.args, launch.kwargs, TARGETS[target]
    )
    source = ASTSource(launch.kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=TARGETS[target], options=dict(options.__dict__))
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        spills = sum(int(n) for n in re.findall(r"\.[vs]gpr_spill_count:\s*(\d+)", text))
    else:
        text = compiled.asm["ptx"]
        registers, spills = cubin_resources(compiled.asm["cubin"])
    matrix = next((i for i in MATRIX_INSTRUCTIONS if i in text), "")
    row = Row(
        kernel=launch.kernel.fn.__name__,
        variant=launch.variant,
        dtype=launch.dtype,
        target=target,
        warps=compiled.metadata.num_warps,
        stages=compiled.metadata.num_stages,
        regs=registers,
        spills=spills,
        shared_bytes=compiled.metadata.shared,
        mma=matrix,
        triton=triton.__version__,
    )
    return row, compiled.asm


def cubin_resources(cubin: bytes) -> tuple[int, int]:
    """Return (registers a thread, bytes of local memory a thread); these kernels have no other use of local
    memory.
    """
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"no resource line in cuobjdump's answer: {usage!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def rows_of(target: str) -> list[Row]:
    return [compile_launch(launch, target)[0] for launch in launches(target)]


def main(arguments: list[str]) -> None:
    targets = tuple(arguments) or tuple(TARGETS)
    rows = []
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), get_context("spawn")) as pool:
        for some in pool.map(rows_of, targets):
            rows.extend(some)
            for row in some:
                print(*asdict(row).values(), sep="\t", flush=True)
    if not arguments:
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("aot.py compiles; unset TRITON_INTERPRET")
    main(sys.argv[1:])
