"""What the monitor costs in the default run: monitored and unmonitored stretches, alternated in one process.

    python -m benchmarks.overhead [--minutes 3] [--variants off2 cheap usual full] [--alone] [--keep]

Each variant is a copy of the same run (same seed, same arithmetic). A round gives every copy one stretch of
steps, in a rotated order; the ratio is stretch time over the unmonitored copy's stretch time in the same
round. `off2` is a second unmonitored copy: its ratio is the noise floor. Two figures per variant: the median
ratio, and the ratio of the summed times, which also holds what does not happen every step (the restart of the
spectral vectors every 100 steps).
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import loop, record, stamp, timing

COLUMNS = (
    "variant", "mode", "steps", "off_ms", "step_ms", "ratio", "low", "high", "total_ratio", "total_low",
    "total_high", "device", "threads", "driver", "torch", "triton", "python", "commit", "date",
)  # fmt: skip
NOISE = "off2"


def measure(
    jobs: dict[str, loop.Loop],
    *,
    seconds: float,
    stretch: int = 4,
    warmup: int = 6,
) -> dict[str, list[float]]:
    """Milliseconds per step of every stretch, by variant; the lists are paired by round."""
    device = next(iter(jobs.values())).device
    for job in jobs.values():
        for _ in range(warmup):
            job.step()
    names = list(jobs)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        turn = rounds % len(names)
        for name in names[turn:] + names[:turn]:
            _wait(device)
            start = time.perf_counter()
            for _ in range(stretch):
                jobs[name].step()
            _wait(device)
            times[name].append(1e3 * (time.perf_counter() - start) / stretch)
        rounds += 1
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def total_ratio(
    of: Sequence[float],
    to: Sequence[float],
    *,
    draws: int = 500,
    seed: int = 0,
) -> timing.Ratio:
    """sum(of) / sum(to) with a 95% bootstrap interval over rounds."""
    rng = random.Random(seed)
    pairs = list(zip(of, to, strict=True))
    found = []
    for _ in range(draws):
        drawn = rng.choices(pairs, k=len(pairs))
        found.append(sum(a for a, _ in drawn) / sum(b for _, b in drawn))
    found.sort()
    low, high = found[round(0.025 * (draws - 1))], found[round(0.975 * (draws - 1))]
    return timing.Ratio(sum(of) / sum(to), low, high, len(pairs))


def rows(
    times: dict[str, list[float]],
    *,
    mode: str,
    stretch: int,
) -> list[record.Row]:
    """One result row per variant except `off`."""
    base = times["off"]
    found = []
    for name, values in times.items():
        if name == "off":
            continue
        typical, total = timing.paired_ratio(values, base), total_ratio(values, base)
        row = {"variant": name, "mode": mode, "steps": str(len(values) * stretch)}
        row |= {
            "off_ms": f"{timing.Timing.of(base).median:.2f}",
            "step_ms": f"{timing.Timing.of(values).median:.2f}",
        }
        row |= {"ratio": f"{typical.median:.4f}", "low": f"{typical.low:.4f}", "high": f"{typical.high:.4f}"}
        row |= {"total_ratio": f"{total.median:.4f}"}
        row |= {"total_low": f"{total.low:.4f}", "total_high": f"{total.high:.4f}"}
        found.append(row)
    return found


def run(
    device: torch.device,
    *,
    variants: Sequence[str],
    seconds: float,
    mode: str = "nano",
    random_tokens: bool = False,
    stretch: int = 4,
    out: Path | None = None,
) -> list[record.Row]:
    """Measure the variants against `off`, print a table, write `out`."""
    facts = stamp.stamp(device)
    with tempfile.TemporaryDirectory() as folder:
        data = loop.random_shards(Path(folder), vocab=8192) if random_tokens else {}
        cfg = loop.default_config(mode, **data)
        names = ["off", *(name for name in variants if name != "off")]
        jobs = {name: loop.Loop("off" if name == NOISE else name, cfg, device) for name in names}
        times = measure(jobs, seconds=seconds, stretch=stretch)
        for job in jobs.values():
            job.close()
    found = rows(times, mode=mode, stretch=stretch)
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, mode {mode}")
    shown = (
        "variant",
        "steps",
        "off_ms",
        "step_ms",
        "ratio",
        "low",
        "high",
        "total_ratio",
        "total_low",
        "total_high",
    )
    print(record.aligned(shown, [[row[name] for name in shown] for row in found]))
    if out:
        sink = record.Csv(out, COLUMNS)
        for row in found:
            sink.add(row | facts)
        sink.close()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="measuring time")
    parser.add_argument(
        "--variants", nargs="*", default=[NOISE, *loop.PRESETS], help="presets or parts to measure"
    )
    parser.add_argument("--alone", action="store_true", help="also every part of the monitor alone")
    parser.add_argument("--mode", default="nano", help="size preset of the run")
    parser.add_argument("--stretch", type=int, default=4, help="steps in a stretch")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's own)")
    parser.add_argument(
        "--random-tokens", action="store_true", help="train on random tokens instead of the corpus"
    )
    parser.add_argument("--out", type=Path, help="CSV file")
    parser.add_argument(
        "--keep", action="store_true", help="write the committed benchmarks/results/overhead.csv"
    )
    args = parser.parse_args(argv)
    known = ("off", NOISE, *loop.PRESETS, *loop.MONITORS)
    if unknown := [name for name in args.variants if name not in known]:
        parser.error(f"no variant {unknown[0]!r}; there are {', '.join(known)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    run(
        torch.device(args.device),
        variants=[*args.variants, *(loop.MONITORS if args.alone else ())],
        seconds=60 * args.minutes,
        mode=args.mode,
        random_tokens=args.random_tokens,
        stretch=args.stretch,
        out=record.RESULTS / "overhead.csv" if args.keep else args.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
