"""Who measured: device, threads, versions, commit and date, as columns of every committed CSV."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from fastmon import device as hardware

ROOT = Path(__file__).resolve().parent.parent


def stamp(device: torch.device) -> dict[str, str]:
    """Facts of this run: device, threads, driver, versions, commit (with `+` where the tree differs),
    date."""
    facts = {
        "device": hardware.name(device),
        "threads": str(torch.get_num_threads()),
        "driver": driver() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    if device.type == "cpu":
        facts["device"] += f" ({torch.backends.cpu.get_cpu_capability()})"
    return facts


def commit() -> str:
    """Short hash of HEAD, `+` appended where tracked files differ; "unknown" outside a git checkout."""
    try:
        short = _git("rev-parse", "--short=10", "HEAD")
        return short + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def driver() -> str:
    """The NVIDIA driver's version, or an empty string where the tool that says it is missing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.splitlines()[0].strip() if said.strip() else ""


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
