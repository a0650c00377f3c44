"""Run the op cases and the bars; print tables, write CSVs.

    python -m benchmarks.run [--ops] [--bars] [--select TEXT] [--seconds 1.5] [--device cpu] [--out FILE]
    [--keep]

Without --ops and --bars both run. `--keep` writes into benchmarks/results/ (the committed files); otherwise
results go to `--out` or are only printed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import bars, cases, peers, record, roofline, stamp, timing
from fastmon.ops import OPS

COLUMNS = (
    "op", "shape", "dtype", "variant", "kind", "ms", "p20", "p80", "rounds", "host_ms", "gb_per_s",
    "tflop_per_s", "roofline", "setup_s", "device", "threads", "driver", "torch", "triton", "python",
    "commit", "date",
)  # fmt: skip
SHOWN = ("variant", "kind", "ms", "p20", "p80", "GB/s", "TFLOP/s", "roofline", "setup s")


def measure(
    case: cases.Case,
    device: torch.device,
    ceiling: roofline.Roofline,
    *,
    seconds: float,
) -> tuple[list[record.Row], dict[str, str]]:
    """Time a case's rows and peers interleaved; the result rows (no stamp yet) and the refused rows with
    reasons."""
    op = OPS[case.op]
    first = cases.inputs(case, device)
    size = sum(flat.numel() * flat.element_size() for flat in first.flats)
    count = timing.input_sets(size, sum(map(len, first.lists)), device)
    sets = [first, *(cases.inputs(case, device, seed=i) for i in range(1, count))]
    found, refused = cases.rows(op, case, sets)
    found += peers.variants(case, sets)
    work = cases.traffic(op, first)
    host: dict[str, str] = {}
    if device.type == "cuda":
        calls = {v.name: v.function for v in found}
        timed, failed = timing.cuda_interleave(calls, {v.name: v.args for v in found}, seconds=seconds)
        refused |= failed
        times = {name: entry.device for name, entry in timed.items()}
        host = {name: record.number(entry.host.median) for name, entry in timed.items()}
    else:
        turns = {v.name: timing.rotate(v.function, v.args) for v in found}
        times = timing.interleave(turns, seconds=seconds)
    out = []
    for variant in found:
        if variant.name not in times:
            continue
        t = times[variant.name]
        bytes_per_s, flops_per_s = work.bytes / (t.median / 1e3), work.flops / (t.median / 1e3)
        share = ceiling.share(work, t.median, case.dtype)
        row = {
            "op": case.op,
            "shape": case.shape,
            "dtype": str(case.dtype).removeprefix("torch."),
            "variant": variant.name,
            "kind": variant.kind,
            "ms": record.number(t.median, 4),
            "p20": record.number(t.p20, 4),
            "p80": record.number(t.p80, 4),
            "rounds": str(t.n),
            "host_ms": host.get(variant.name, ""),
            "gb_per_s": record.number(bytes_per_s / 1e9),
            "tflop_per_s": record.number(flops_per_s / 1e12),
            "roofline": record.number(share),
            "setup_s": record.number(variant.setup_s) if variant.setup_s else "",
        }
        out.append(row)
    return out, refused


def run_ops(
    device: torch.device,
    *,
    seconds: float,
    select: str = "",
    out: Path | None = None,
    partial: bool = False,
) -> list[record.Row]:
    """Measure every case whose id contains `select`, print a table per case, write `out` row by row."""
    facts = stamp.stamp(device)
    ceiling = roofline.measure(device)
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}")
    print(
        f"measured here: read {ceiling.read / 1e9:.1f} GB/s, copy {ceiling.copy / 1e9:.1f} GB/s\n", flush=True
    )
    sink = record.Csv(out, COLUMNS, partial=partial) if out else None
    found: list[record.Row] = []
    for case in cases.CASES:
        if select not in case.id or device.type not in case.devices or case.op not in OPS:
            continue
        try:
            rows, refused = measure(case, device, ceiling, seconds=seconds)
        except torch.OutOfMemoryError as error:
            print(f"{case.id}: skipped, out of memory ({str(error).splitlines()[0]})\n", flush=True)
            continue
        rows.sort(key=lambda row: float(row["ms"]))
        for row in rows:
            if sink:
                sink.add(row | facts)
        found += [row | facts for row in rows]
        columns = ("variant", "kind", "ms", "p20", "p80", "gb_per_s", "tflop_per_s", "roofline", "setup_s")
        print(f"{case.id}")
        print(record.aligned(SHOWN, [[row[name] for name in columns] for row in rows]))
        for name, reason in refused.items():
            if not reason.startswith("for "):  # rows of another device are no news
                print(f"  not run: {name}: {reason}")
        print(flush=True)
    if sink:
        sink.close()
    return found


def default_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run; 0 on success, 1 where --check-bars found one unmet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--ops", action="store_true", help="op cases only")
    parser.add_argument("--bars", action="store_true", help="bars only")
    parser.add_argument("--select", default="", help="only cases whose id contains this text")
    parser.add_argument("--seconds", type=float, default=1.5, help="time for each case, in seconds")
    parser.add_argument("--device", default="", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's own)")
    parser.add_argument("--out", type=Path, help="folder for the CSVs")
    parser.add_argument("--partial", action="store_true", help="write CSVs in place, valid whenever cut off")
    parser.add_argument("--keep", action="store_true", help="write the committed CSVs in benchmarks/results")
    parser.add_argument("--check-bars", action="store_true", help="exit 1 where a bar is not met")
    args = parser.parse_args(argv)
    device = torch.device(args.device) if args.device else default_device()
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.run: --device cuda was asked for, but torch sees no CUDA device", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = record.RESULTS if args.keep else args.out
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    both = not args.ops and not args.bars
    met = True
    if args.bars or both:
        met = bars.run(
            device, out=folder / f"bars_{device.type}.csv" if folder else None, partial=args.partial
        )
    if args.ops or both:
        run_ops(
            device,
            seconds=args.seconds,
            select=args.select,
            out=folder / f"ops_{device.type}.csv" if folder else None,
            partial=args.partial,
        )
    return 1 if args.check_bars and not met else 0


if __name__ == "__main__":
    sys.exit(main())
