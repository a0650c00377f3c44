"""Checks that only a device can answer: every row runs, agrees with the eager row, is captured, never
synchronises.

    python -m benchmarks.gpu_checks [--device cuda] [--only agreement opcheck capture sync monitor] [--out FILE]

One line per (check, op, row). `compute-sanitizer` runs it with `--only agreement`. On a CPU the checks that
need a stream (capture, sync) are left out. Exit code 1 where a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import cases, record
from fastmon.backend import Op, force
from fastmon.ops import OPS

COLUMNS = ("check", "op", "row", "shape", "dtype", "result", "detail")
SHAPES = ("tiny", "odd")
DTYPES = (torch.float32, torch.bfloat16)
# Two bf16 orders of summation; the accuracy itself is tested against fp64 in tests/.
CLOSE = {"newton_schulz": 6e-2, "newton_schulz_moments": 6e-2}


@dataclass(frozen=True)
class Outcome:
    """What one check found. `result` is ok, failed or skipped."""

    check: str
    op: str
    row: str
    shape: str
    dtype: str
    result: str
    detail: str = ""

    def cells(self) -> record.Row:
        """As columns of the CSV."""
        return {name: str(getattr(self, name)).replace("\n", " ")[:300] for name in COLUMNS}


Check = Callable[[Op, str, cases.Inputs], str]


def run_rows(check: Check, name: str, device: torch.device) -> Iterator[Outcome]:
    """Apply a check to every row of every op that runs here, on small shapes in two dtypes."""
    for op_name in cases.ARGUMENTS:
        if op_name not in OPS:
            continue
        op = OPS[op_name]
        for shape in SHAPES:
            for dtype in DTYPES:
                one = cases.inputs(cases.Case(op_name, shape, dtype), device)
                for impl in op.impls:
                    if impl.refuses(op.facts(one.args)) is None:
                        yield _guarded(check, name, op, impl.name, one, shape, dtype)


def _guarded(
    check: Check,
    name: str,
    op: Op,
    row: str,
    one: cases.Inputs,
    shape: str,
    dtype: torch.dtype,
) -> Outcome:
    where = (name, op.name, row, shape, str(dtype).removeprefix("torch."))
    try:
        with torch.no_grad(), force(row):
            return Outcome(*where, "ok", check(op, row, one))
    except Exception as error:  # a report of all rows is worth more than a stop at the first bad one
        return Outcome(*where, "failed", f"{type(error).__name__}: {error}")


def fresh(op: Op, args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments with their own copy of what the op writes."""
    return tuple(arg.clone() if i in op.mutated else arg for i, arg in enumerate(args))


def flat(result: Any) -> list[Tensor]:
    """All tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [x for entry in result for x in flat(entry)]


def agreement(op: Op, row: str, one: cases.Inputs) -> str:
    """The row's result equals the reference's within a loose bound; NaN stands where the reference has
    NaN."""
    ours = flat(op(*fresh(op, one.args)))
    theirs = flat(op.reference(*fresh(op, one.args)))
    bound, worst = CLOSE.get(op.name, 2e-3), 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.double(), b.double()
        if not torch.equal(a.isnan(), b.isnan()):
            raise AssertionError(f"NaN in {a.isnan().sum()} places, the reference has {b.isnan().sum()}")
        scale = b.nan_to_num(0.0, 0.0, 0.0).abs().amax().clamp(min=1e-30) if b.numel() else b.sum()
        same = torch.where(a == b, 0.0, (a - b).abs() / scale)
        error = float(same.nan_to_num(0.0).amax()) if same.numel() else 0.0
        if error > bound:
            raise AssertionError(f"differs from the reference by {error:.2e} of the largest value")
        worst = max(worst, error)
    return f"{worst:.1e} of the largest value"


def opcheck(op: Op, row: str, one: cases.Inputs) -> str:
    """torch.library.opcheck: the schema says what is written, and the fake gives the right shapes."""
    torch.library.opcheck(op.overload, fresh(op, one.args), test_utils=("test_schema", "test_faketensor"))
    return ""


def capture(op: Op, row: str, one: cases.Inputs) -> str:
    """The op can be captured into a CUDA graph, and a replay gives what a plain call gives."""
    args = fresh(op, one.args)
    states = [args[i] for i in op.mutated]
    starts = [state.clone() for state in states]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        plain = [x.clone() for x in flat(op(*args))]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = op(*args)
    for state, start in zip(states, starts, strict=True):
        state.copy_(start)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(flat(result), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    return "replay is bit-identical"


def no_sync(op: Op, row: str, one: cases.Inputs) -> str:
    """After one warm-up call the op never makes the host wait."""
    args = fresh(op, one.args)
    op(*args)
    with sync_is_an_error():
        op(*args)
    return ""


@contextlib.contextmanager
def sync_is_an_error() -> Iterator[None]:
    """CUDA's sync-debug mode "error" within the block; nothing where there is no CUDA device."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def monitored_step(device: torch.device) -> Iterator[Outcome]:
    """A training step under each preset makes the host wait nowhere (10 steps after 3 of warm-up)."""
    from fastmon.monitor import Monitor

    for preset in ("off", "cheap", "usual", "full"):
        where = ("monitor", f"preset {preset}", "", "mlp", "float32")
        try:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).to(device)
            optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
            with tempfile.TemporaryDirectory() as folder:
                monitor = Monitor(model, optimizer, preset=preset, run_dir=folder)
                x = torch.randn(32, 64, device=device)
                for step in range(1, 14):
                    with sync_is_an_error() if step > 3 else contextlib.nullcontext():
                        loss = (model(x) - x).square().mean()
                        loss.backward()
                        monitor.clip_grad_norm_(1.0)
                        optimizer.step()
                        monitor.step(step, {"Loss/train_loss": loss})
                        optimizer.zero_grad()
                monitor.close()
            yield Outcome(*where, "ok")
        except Exception as error:  # as above: report every preset
            yield Outcome(*where, "failed", f"{type(error).__name__}: {error}")


def outcomes(device: torch.device, only: Sequence[str]) -> Iterator[Outcome]:
    """All checks asked for, those that need a CUDA stream only on CUDA."""
    table: dict[str, Check] = {"agreement": agreement, "opcheck": opcheck}
    if device.type == "cuda":
        table |= {"capture": capture, "sync": no_sync}
    for name, check in table.items():
        if name in only:
            yield from run_rows(check, name, device)
    if "monitor" in only:
        yield from monitored_step(device)


CHECKS = ("agreement", "opcheck", "capture", "sync", "monitor")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks, print failures and a count; 1 where one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_checks", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", default=list(CHECKS), choices=CHECKS)
    parser.add_argument("--out", type=Path, help="CSV file, complete after every line")
    args = parser.parse_args(argv)
    sink = record.Csv(args.out, COLUMNS, partial=True) if args.out else None
    counts = {"ok": 0, "failed": 0}
    for outcome in outcomes(torch.device(args.device), args.only):
        counts[outcome.result] += 1
        if sink:
            sink.add(outcome.cells())
        if outcome.result == "failed":
            print(
                f"FAILED {outcome.check} {outcome.op} {outcome.row} {outcome.shape} {outcome.dtype}: {outcome.detail}"
            )
    if sink:
        sink.close()
    print(f"checks on {args.device}: {counts['ok']} ok, {counts['failed']} failed", flush=True)
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
