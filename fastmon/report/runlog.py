"""Read a run folder back: the header line, the flat rows, and every line that could not be read, by number.

A run log is JSON lines. The first line is a header (configuration, versions, device); each later line is one
flat row, `{"step": 12, "time": ..., "Loss/train_loss": 3.4}`. JSON has no NaN, so non-finite values are the
strings "NaN", "Infinity" and "-Infinity". A killed process leaves a torn last line: it is counted and named,
never dropped in silence.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def nonfinite_name(value: float) -> str:
    """The log's word for a non-finite float: NaN, Infinity or -Infinity."""
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


@dataclass(frozen=True)
class Series:
    """One metric over the run: `steps[i]` has `values[i]`; every value is finite."""

    steps: list[int]
    values: list[float]

    def __len__(self) -> int:
        return len(self.steps)

    def mean(self, *, skip: int = 0) -> float | None:
        """Mean after the first `skip` values; of all where there are no more than that; None when empty."""
        kept = self.values[skip:] or self.values
        return sum(kept) / len(kept) if kept else None


@dataclass(frozen=True)
class RunLog:
    """What one JSONL file says. `broken` holds (line number, reason), `nonfinite` (step, name, value)."""

    path: Path
    header: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    broken: list[tuple[int, str]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)  # {"step": ..., "event": kind, ...}

    def series(self, name: str) -> Series:
        """The finite values of one metric, in file order; empty when the run never logged it."""
        steps: list[int] = []
        values: list[float] = []
        for row in self.rows:
            value = row.get(name)
            if isinstance(value, float) and math.isfinite(value):
                steps.append(row["step"])
                values.append(value)
        return Series(steps, values)

    def family(self, prefix: str) -> dict[str, Series]:
        """Every metric below `prefix` by what follows it: `Model/spectral_norm/` -> {parameter: series}."""
        names = dict.fromkeys(name for row in self.rows for name in row if name.startswith(prefix))
        return {name.removeprefix(prefix): self.series(name) for name in names}

    @property
    def nonfinite(self) -> list[tuple[int, str, float]]:
        """Every NaN and infinity in the log, as (step, metric, value)."""
        return [
            (row["step"], name, value)
            for row in self.rows
            for name, value in row.items()
            if isinstance(value, float) and not math.isfinite(value)
        ]


def read_run(
    path: Path,  # runs/<name>/metrics.jsonl or params.jsonl
) -> RunLog:
    """Parse a JSONL run log.

    Numbers become float (`step` int), the three non-finite strings become NaN and the infinities, other
    strings stay. A line without a "step" is the header; a later one (after a resume) updates it.
    Raises FileNotFoundError when there is no such file. Cost: one pass, all rows held in memory.
    """
    log = RunLog(path)
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                log.broken.append((number, f"not JSON: {error.msg} at column {error.colno}"))
                continue
            if not isinstance(entry, dict):
                log.broken.append((number, f"expected an object, found {type(entry).__name__}"))
            elif "step" not in entry:
                log.header.update(entry)
            elif isinstance(entry["step"], bool) or not isinstance(entry["step"], int):
                log.broken.append((number, f"step is {entry['step']!r}, not an integer"))
            elif "event" in entry:
                log.events.append(entry)
            else:
                log.rows.append({name: _value(name, value) for name, value in entry.items()})
    return log


def _value(name: str, value: object) -> object:
    """A row's number as float; the step and everything that is not a number stay as they are."""
    if name == "step" or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return float(value)
    if isinstance(value, str):
        return NONFINITE.get(value, value)
    return value
