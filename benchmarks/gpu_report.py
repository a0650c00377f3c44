"""Everything a machine with a GPU can say about this checkout, in one command and under nine minutes.

    python -m benchmarks.gpu_report --out OUT

Builds the extension, runs the tests on the GPU, compute-sanitizer on small cases, opcheck, graph capture and
sync-debug checks, then the benchmarks and the monitor's overhead. Each stage is a process of its own with a
time budget; OUT/report.md, OUT/log.txt and the CSVs are written as it goes, so a run that is cut off keeps
what it has. No network. Without a GPU: one sentence and exit code 2. Exit code 1 where a stage failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from benchmarks import record, stamp

TOTAL_S = 500  # of the nine minutes; the rest is starting up and writing
PYTHON = sys.executable


@dataclass(frozen=True)
class Stage:
    """One process. `needs` is a program that must exist; `budget` bounds its seconds; `reserve` is kept for
    later ones."""

    name: str
    command: tuple[str, ...]
    budget: int
    reserve: int = 0
    needs: str = ""


def stages(out: Path) -> tuple[Stage, ...]:
    """The plan, in order of worth: correctness first, figures second."""
    checks = (PYTHON, "-m", "benchmarks.gpu_checks")
    small = (PYTHON, "-m", "benchmarks.gpu_checks", "--only", "agreement")
    sanitizer = "compute-sanitizer"
    guard = (sanitizer, "--error-exitcode", "9", "--target-processes", "all", "--tool")
    build = (
        PYTHON,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-q",
        "-e",
        ".",
    )
    tests = (PYTHON, "-m", "pytest", "tests", "-m", "not slow", "--device", "cuda", "-p", "no:cacheprovider")
    ops = (
        PYTHON,
        "-m",
        "benchmarks.run",
        "--device",
        "cuda",
        "--seconds",
        "0.4",
        "--out",
        str(out),
        "--partial",
    )
    overhead = (PYTHON, "-m", "benchmarks.overhead", "--device", "cuda", "--mode", "gpt2-124m", "--random-tokens",
                "--minutes", "0.8", "--variants", "off2", "usual", "full",
                "--out", str(out / "overhead_cuda.csv"))  # fmt: skip
    return (
        Stage("build", build, 120),
        Stage("checks", (*checks, "--out", str(out / "checks.csv")), 90),
        Stage("tests", (*tests, "--maxfail=20"), 150, reserve=200),
        Stage("benchmarks", ops, 150, reserve=110),
        Stage("overhead", overhead, 90, reserve=50),
        Stage("memcheck", (*guard, "memcheck", *small), 60, needs=sanitizer),
        Stage("racecheck", (*guard, "racecheck", *small), 60, needs=sanitizer),
    )


@dataclass
class Done:
    """How a stage ended: ok, failed, cut off, or skipped with the reason; its last lines of output."""

    stage: Stage
    result: str
    seconds: float = 0.0
    tail: str = ""


def run_stage(
    stage: Stage,
    seconds: float,
    log: IO[str],
    *,
    cwd: Path,
) -> Done:
    """Run one stage with its output going to the log as it comes; end its whole process group at the time
    limit."""
    if stage.needs and shutil.which(stage.needs) is None:
        return Done(stage, f"skipped: {stage.needs} is not on this machine")
    if seconds < 5:
        return Done(stage, "skipped: no time left")
    print(f"\n=== {stage.name}: {' '.join(stage.command)}", file=log, flush=True)
    at = log.tell()
    environment = os.environ | {
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
    }
    start = time.monotonic()
    process = subprocess.Popen(
        stage.command, cwd=cwd, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        code = process.wait(timeout=seconds)
        result = "ok" if code == 0 else f"failed (exit code {code})"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        result = f"cut off after {seconds:.0f} s"
    log.flush()
    with Path(log.name).open(encoding="utf-8", errors="replace") as read:
        read.seek(at)
        said = [line.rstrip() for line in read if line.strip()]
    return Done(stage, result, time.monotonic() - start, "\n".join(said[-12:]))


def write_report(out: Path, facts: dict[str, str], done: Sequence[Done]) -> None:
    """OUT/report.md from what is there: facts, stages, then the tables of the CSVs."""
    parts = ["# GPU report", ", ".join(f"{key} {value}" for key, value in facts.items() if value) + "."]
    rows = [(one.stage.name, one.result, f"{one.seconds:.0f} s") for one in done]
    parts.append(record.markdown(("stage", "result", "time"), rows))
    for name, show in _TABLES.items():
        if (path := out / name).is_file() and (found := record.read(path)):
            parts += [f"## {path.stem}", show(found)]
    failed = [one for one in done if one.result.startswith(("failed", "cut off"))]
    parts += [f"## last lines of {one.stage.name}\n\n```\n{one.tail}\n```" for one in failed]
    (out / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _checks_table(rows: Sequence[record.Row]) -> str:
    keys = dict.fromkeys((row["check"], row["op"], row["row"]) for row in rows)
    cells = []
    for key in keys:
        mine = [row for row in rows if (row["check"], row["op"], row["row"]) == key]
        bad = [row for row in mine if row["result"] != "ok"]
        cells.append(
            (*key, f"{len(mine) - len(bad)}/{len(mine)}", bad[0]["detail"].replace("|", "/") if bad else "")
        )
    return record.markdown(("check", "op", "row", "ok", "first failure"), cells)


def _columns(*names: str) -> Callable[[Sequence[record.Row]], str]:
    return lambda rows: record.markdown(names, [[row[name] for name in names] for row in rows])


_TABLES: dict[str, Callable[[Sequence[record.Row]], str]] = {
    "checks.csv": _checks_table,
    "bars_cuda.csv": _columns("bar", "value", "unit", "limit", "met", "detail"),
    "ops_cuda.csv": _columns(
        "op", "shape", "dtype", "variant", "kind", "ms", "host_ms", "gb_per_s", "tflop_per_s", "roofline"
    ),
    "overhead_cuda.csv": _columns(
        "variant", "mode", "steps", "off_ms", "step_ms", "ratio", "low", "high", "total_ratio"
    ),
}


def run(
    out: Path, plan: Sequence[Stage], facts: dict[str, str], *, cwd: Path, total_s: float = TOTAL_S
) -> bool:
    """Run the stages within the total time, rewriting the report after each; True where none failed."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + total_s
    done: list[Done] = []
    with (out / "log.txt").open("w", encoding="utf-8") as log:
        for stage in plan:
            left = end - time.monotonic()
            finished = run_stage(stage, min(stage.budget, left - stage.reserve), log, cwd=cwd)
            done.append(finished)
            write_report(out, facts, done)
            print(f"{stage.name:<12} {finished.seconds:5.0f} s  {finished.result}", flush=True)
    return not any(one.result.startswith("failed") for one in done)


def main(argv: Sequence[str] | None = None) -> int:
    """Check for a GPU, run the plan; 0 clean, 1 a stage failed, 2 no GPU or bad usage."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for report.md, log.txt and the CSVs")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            "benchmarks.gpu_report: this machine has no GPU that torch can use, so there is nothing to report"
        )
        return 2
    out = args.out.resolve()
    return 0 if run(out, stages(out), stamp.stamp(torch.device("cuda")), cwd=stamp.ROOT) else 1


if __name__ == "__main__":
    sys.exit(main())
