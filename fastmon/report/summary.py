"""The short summary of a run: `summary.md` (what ran, results, trouble) and `summary.png` (plots)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastmon.report.plots import draw
from fastmon.report.runlog import RunLog, Series, nonfinite_name, read_run

CONFIG_KEYS = (  # the configuration fields that tell two runs apart, in the order people say them
    "workload", "mode", "width", "optimizer", "lr", "schedule", "weight_decay", "batch_size", "grad_accum",
    "seq_len", "steps", "grad_clip", "precision", "seed", "monitor",
)  # fmt: skip
_EVENT_HEAD = ("step", "time", "rank", "event")
NO_PLOTS = "Plots: matplotlib is not installed; `pip install 'fastmon[plots]'` adds summary.png."


def write_summary(
    run_dir: Path,  # runs/<name>, holding metrics.jsonl and, when parameters were logged, params.jsonl
) -> Path:
    """Write `summary.md` and, with matplotlib, `summary.png` into the run folder; return the Markdown's path.

    Reads only what the run logged: a quantity that is not in the log has no line in the summary. Unreadable
    lines are counted and named. Raises FileNotFoundError when `metrics.jsonl` is missing. Cost: one pass over
    the log and about a second of drawing.
    """
    run_dir = Path(run_dir)
    log = read_run(run_dir / "metrics.jsonl")
    params_path = run_dir / "params.jsonl"
    params = read_run(params_path) if params_path.is_file() else None
    parts = [f"# Run {run_dir.resolve().name}", _what_ran(log)]
    try:
        drawn = draw(log, run_dir / "summary.png", title=run_dir.resolve().name)
    except ImportError:
        parts.append(NO_PLOTS)
    else:
        if drawn:
            parts.append("![loss, learning rate, norms and step time over the run](summary.png)")
    parts += _results(log)
    parts += _matrices(log if params is None else params, log)
    parts += ["## Events", _events([log, *([params] if params else [])])]
    path = run_dir / "summary.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def _what_ran(log: RunLog) -> str:
    """The configuration, then device, versions and commit, as far as the header says."""
    header = log.header
    config = header.get("config")
    lines = []
    if isinstance(config, Mapping):
        said = [
            f"{key.replace('_', ' ')} {_plain(config[key])}"
            for key in CONFIG_KEYS
            if config.get(key) is not None
        ]
        lines.append(", ".join(said) + ".")
    facts = []
    for key, label in (
        ("device", "device"),
        ("versions", ""),
        ("git_commit", "commit"),
        ("commit", "commit"),
    ):
        if header.get(key):
            words = re.sub(
                r"\b([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", _plain(header[key])
            )  # a full hash, shortened
            facts.append(f"{label} {words}".strip())
    if facts:
        lines.append("; ".join(facts) + ".")
    return "  \n".join(line for line in lines if line.strip("."))


def _plain(value: Any) -> str:
    """A header value as words: a mapping becomes "torch 2.11, numpy 2.4", a number keeps its short form."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(entry)}" for key, entry in value.items() if entry not in (None, ""))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _results(log: RunLog) -> list[str]:
    """Two tables: losses (first, best, last, each with its step) and the run's single figures."""
    losses = []
    for name in _loss_names(log.rows):
        series = log.series(name)
        if not series.steps:
            continue
        best = min(range(len(series)), key=series.values.__getitem__)
        cells = [f"{series.values[i]:.4f} (step {series.steps[i]})" for i in (0, best, -1)]
        losses.append(f"| {name.removeprefix('Loss/')} | " + " | ".join(cells) + " |")
    figures = [f"| {name} | {value} |" for name, value in _figures(log)]
    parts = ["## Results"]
    if losses:
        parts.append("\n".join(["| loss | first | best | last |", "|---|---|---|---|", *losses]))
    if figures:
        parts.append("\n".join(["| quantity | value |", "|---|---|", *figures]))
    if not losses and not figures:
        parts.append("The log holds no rows.")
    return parts


def _loss_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every logged `Loss/...`: training first, validation second, then the others in order of appearance."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("Loss/"))
    first = [name for name in ("Loss/train_loss", "Loss/val_loss") if name in names]
    return first + [name for name in names if name not in first]


def _figures(log: RunLog) -> list[tuple[str, str]]:
    """(quantity, value with unit): steps, times, throughput, MFU, memory and the monitor's own cost."""
    found: list[tuple[str, str]] = []
    if log.rows:
        found.append(("steps", f"{max(row['step'] for row in log.rows)}"))
    for name, label, text in (
        ("Time/training_time_ms", "training time", lambda value: f"{value / 1000:.1f} s"),
        ("Time/total_time_s", "wall time, everything", lambda value: f"{value:.1f} s"),
        ("Time/step_avg_ms", "step average", lambda value: f"{value:.2f} ms"),
    ):
        series = log.series(name)
        if series.values:
            found.append((label, text(series.values[-1])))
    steps = log.series("Time/step_ms")
    for name, label, text in (
        ("Time/tokens_per_s", "tokens per second", lambda value: f"{value:,.0f}"),
        ("Hardware/mfu", "model FLOP utilisation", lambda value: f"{100 * value:.1f} %"),
        ("Hardware/gpu_utilization", "GPU utilisation", lambda value: f"{100 * value:.0f} %"),
    ):
        mean = log.series(name).mean(
            skip=1
        )  # the first step carries set-up: allocation, compilation, cold caches
        if mean is not None:
            found.append((label, text(mean)))
    peak = log.series("Hardware/peak_memory_mb") if log.series("Hardware/peak_memory_mb").values else None
    memory = peak or log.series("Hardware/host_rss_mb")
    if memory.values:
        found.append(("peak device memory" if peak else "host memory", f"{max(memory.values):,.0f} MiB"))
    cost, step = log.series("Time/monitor_ms").mean(skip=1), steps.mean(skip=1)
    if cost is not None:
        share = f", {100 * cost / step:.2f} % of the step" if step else ""
        found.append(("the monitor's own cost", f"{cost:.3f} ms a step{share}"))
    return found


def _matrices(params: RunLog, log: RunLog) -> list[str]:
    """The extremes among hidden matrices: spectral norm and its growth, stable rank, update ratio."""
    spectral = _family("Model/spectral_norm/", params, log)
    rank = _family("Model/stable_rank/", params, log)
    ratio = _family("Optimization/update_ratio/", params, log)
    lines = []
    if spectral:
        name = max(spectral, key=lambda key: spectral[key].values[-1])
        lines.append(f"- largest spectral norm: `{name}` {spectral[name].values[-1]:.4g}")
        growing = {
            key: s.values[-1] / s.values[0] for key, s in spectral.items() if len(s) > 1 and s.values[0] > 0
        }
        if growing:
            name = max(growing, key=growing.__getitem__)
            s = spectral[name]
            lines.append(
                f"- largest growth: `{name}` x{growing[name]:.3g} "
                f"({s.values[0]:.4g} at step {s.steps[0]}, {s.values[-1]:.4g} at step {s.steps[-1]})"
            )
    if rank:
        name = min(rank, key=lambda key: rank[key].values[-1])
        lines.append(f"- lowest stable rank: `{name}` {rank[name].values[-1]:.3g}")
    if ratio:
        name = max(ratio, key=lambda key: ratio[key].values[-1])
        lines.append(f"- largest update ratio at the end: `{name}` {ratio[name].values[-1]:.2e}")
    return ["## Matrices", "\n".join(lines)] if lines else []


def _family(prefix: str, *logs: RunLog) -> dict[str, Series]:
    """The first log's non-empty per-parameter series below a prefix; they may live in either file."""
    for log in logs:
        found = {name: series for name, series in log.family(prefix).items() if series.values}
        if found:
            return found
    return {}


def _events(logs: Iterable[RunLog]) -> str:
    """Non-finite values by metric with their first step, non-finite gradients, events, unreadable lines."""
    lines = []
    for log in logs:
        events = log.nonfinite
        for name, count in Counter(name for _, name, _ in events).most_common(10):
            step, value = next((step, value) for step, other, value in events if other == name)
            times = f"{count} time{'s' if count > 1 else ''}"
            lines.append(f"- `{name}` was not finite {times}, first {nonfinite_name(value)} at step {step}")
        bad = [
            (row["step"], row["Gradients/nonfinite"]) for row in log.rows if row.get("Gradients/nonfinite")
        ]
        if bad:
            lines.append(
                f"- non-finite gradients in {len(bad)} steps, first at step {bad[0][0]} "
                f"({bad[0][1]:.0f} elements)"
            )
        for kind, count in Counter(event["event"] for event in log.events).items():
            first = next(event for event in log.events if event["event"] == kind)
            facts = ", ".join(f"{key} {_plain(first[key])}" for key in first if key not in _EVENT_HEAD)
            times = f"{count} times, first at" if count > 1 else "at"
            lines.append(f"- {kind} {times} step {first['step']}" + (f" ({facts})" if facts else ""))
        if log.broken:
            shown = "; ".join(f"line {number}: {reason}" for number, reason in log.broken[:5])
            more = f"; and {len(log.broken) - 5} more" if len(log.broken) > 5 else ""
            lines.append(f"- {len(log.broken)} unreadable in `{log.path.name}`: {shown}{more}")
    return "\n".join(lines) or "None. Every logged value is finite and every line was readable."
