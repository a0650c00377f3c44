"""Sinks: a Row in, bytes out. They format floats and never see a tensor.

Console prints one line a row in the form that speedrun readers parse; Jsonl writes `metrics.jsonl` and, for the rows
that exist once per parameter, `params.jsonl`. A sink that raises is switched off with one warning; training goes on.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from fastmon.metrics import METRICS

log = logging.getLogger("fastmon")

PARAMS_BYTES = 50 * 2**20  # params.jsonl is thinned past this size per PARAMS_STEPS steps
PARAMS_STEPS = 10_000


@dataclass(slots=True)
class Row:
    """What one step says. Names are those of METRICS; values are floats, non-finite ones included."""

    step: int
    time: float = 0.0  # seconds since the epoch, when the step ended
    rank: int = 0
    values: dict[str, float] = field(default_factory=dict)  # metrics.jsonl
    params: dict[str, float] = field(default_factory=dict)  # params.jsonl: names that end in a parameter
    events: list[dict[str, Any]] = field(default_factory=list)  # what happened: {"event": ..., ...}
    shared: dict[str, Any] = field(default_factory=dict)  # what one observer leaves for the next; not written

    def event(self, kind: str, **facts: str | float) -> None:
        """Note something that happened at this step; it becomes a line of its own in the run log."""
        self.events.append({"event": kind, **facts})


class Sink(Protocol):
    """Where rows go."""

    def write(self, row: Row) -> None:
        """Take one row; rows come in the order of their steps."""

    def close(self) -> None:
        """Flush and let go."""


class Null:
    """Takes rows and does nothing."""

    def write(self, row: Row) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Console:
    """One line a row: `step:1000/1750 train_loss:3.4123 train_time:180420.0ms step_avg:180.42ms`.

    A row with a validation loss prints `val_loss` instead. Every `log_interval` steps, the first step, the last one and
    every validation. On a terminal, a bar with the share of the run stands on the line below and moves with every row.
    """

    def __init__(
        self,
        *,
        log_interval: int = 10,
        total_steps: int | None = None,
        stream: IO[str] | None = None,  # default: standard output
    ) -> None:
        self.log_interval, self.total_steps = log_interval, total_steps
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()

    def write(self, row: Row) -> None:
        """Print the row where it is due."""
        validated = "Loss/val_loss" in row.values
        last = row.step == self.total_steps
        due = self.log_interval > 0 and row.step % self.log_interval == 0
        clear = "\r\x1b[K" if self._terminal else ""
        if row.step == 1 or due or last or validated:
            print(clear + self.line(row), file=self._stream)
        if self._terminal and self.total_steps:
            filled = 30 * min(row.step, self.total_steps) // self.total_steps
            eta = _clock(row.values["Time/eta_s"]) if "Time/eta_s" in row.values else ""
            bar = "#" * filled + "." * (30 - filled)
            print(
                f"\r[{bar}] {row.step}/{self.total_steps} {eta}", end="\n" if last else "", file=self._stream
            )
        self._stream.flush()

    def line(self, row: Row) -> str:
        """The row as one line; a value that is absent is left out."""
        total = f"/{self.total_steps}" if self.total_steps else ""
        words = [f"step:{row.step}{total}"]
        loss = "val_loss" if "Loss/val_loss" in row.values else "train_loss"
        for word, name, form in (
            (loss, f"Loss/{loss}", "{:.4f}"),
            ("train_time", "Time/training_time_ms", "{:.1f}ms"),
            ("step_avg", "Time/step_avg_ms", "{:.2f}ms"),
        ):
            if name in row.values:
                words.append(f"{word}:{form.format(row.values[name])}")
        return " ".join(words)

    def close(self) -> None:
        """Leave the cursor on a fresh line."""
        self._stream.flush()


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"ETA {whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


class Jsonl:
    """`metrics.jsonl` (a header line, then one flat object a row) and `params.jsonl` in `folder`.

    Every line reaches the operating system before `write` returns, so a killed run loses at most the line it was
    writing. Non-finite values are the strings "NaN", "Infinity" and "-Infinity". Events are lines of their own, with
    "step" and "event". Values in params.jsonl have 7 significant digits (fp32 has no more); past 50 MB per 10,000 steps
    only every k-th row is kept there, which is said once.

    header: facts of the run for the first line; schema, metric units and versions are added.
    append: continue the files that are there (a resumed run). Otherwise older files are kept under another name.
    Raises OSError where the folder cannot be written.
    """

    def __init__(
        self, folder: str | Path, *, header: Mapping[str, Any] | None = None, append: bool = False
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not append:
            for name in ("metrics.jsonl", "params.jsonl"):
                _set_aside(self.folder / name)
        self._metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._params: IO[str] | None = None
        self._params_bytes = 0  # of the file, with what an earlier process wrote
        self._written, self._params_rows, self._stride = 0, 0, 1  # by this process
        self._header = dict(header or {})
        if self._metrics.tell() == 0 or self._header:
            self._put(self._metrics, _dump({**_schema(), **self._header}))

    def write(self, row: Row) -> None:
        """Append the row, its events and, where it has them, its per-parameter values."""
        head = {"step": row.step, "time": row.time, "rank": row.rank}
        lines = [_dump({**head, **row.values})]
        lines += [_dump({**head, **event}) for event in row.events]
        self._put(self._metrics, "\n".join(lines))
        if row.params and self._keeps(row.step):
            self._write_params(row, head)

    def close(self) -> None:
        """Close both files."""
        self._metrics.close()
        if self._params is not None:
            self._params.close()

    def _put(self, file: IO[str], text: str) -> None:
        file.write(text + "\n")
        file.flush()

    def _write_params(self, row: Row, head: dict[str, Any]) -> None:
        if self._params is None:
            self._params = (self.folder / "params.jsonl").open("a", encoding="utf-8")
            self._params_bytes = self._params.tell()
            if self._params_bytes == 0:
                self._put(self._params, _dump({**_schema(), **self._header}))
        fields = [json.dumps(head)[:-1]]
        for name, value in row.params.items():
            number = f"{value:.7g}" if math.isfinite(value) else f'"{_nonfinite(value)}"'
            fields.append(f"{_quoted(name)}: {number}")
        text = ", ".join(fields) + "}"
        self._put(self._params, text)
        self._params_bytes += len(text) + 1
        self._written += len(text) + 1
        self._params_rows += 1

    def _keeps(self, step: int) -> bool:
        allowed = PARAMS_BYTES * max(1.0, step / PARAMS_STEPS)
        if self._params_bytes > allowed and self._stride == 1 and self._params_rows:
            per_row = self._written / self._params_rows
            self._stride = max(2, math.ceil(per_row * PARAMS_STEPS / PARAMS_BYTES))
            log.warning(
                "params.jsonl has passed 50 MB per 10,000 steps: from now on every %dth row is kept",
                self._stride,
            )
        return step % self._stride == 0


def _schema() -> dict[str, Any]:
    return {
        "fastmon": 1,  # version of this format
        "started": time.time(),
        "units": {metric.name: metric.unit for metric in METRICS.values()},
    }


def _dump(fields: Mapping[str, Any]) -> str:
    try:
        return json.dumps(fields, allow_nan=False)
    except ValueError:
        return json.dumps(_spelled(fields), allow_nan=False)


def _spelled(value: Any) -> Any:
    """The same with non-finite floats as strings, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return _nonfinite(value)
    if isinstance(value, Mapping):
        return {key: _spelled(entry) for key, entry in value.items()}
    return [_spelled(entry) for entry in value] if isinstance(value, list | tuple) else value


def _nonfinite(value: float) -> str:
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


_quotes: dict[str, str] = {}


def _quoted(name: str) -> str:
    """A name as JSON; the same few names come every step."""
    if name not in _quotes:
        _quotes[name] = json.dumps(name)
    return _quotes[name]


def _set_aside(path: Path) -> None:
    """Rename an older, non-empty log: metrics.jsonl -> metrics.1.jsonl."""
    if not path.exists() or path.stat().st_size == 0:
        return
    number = 1
    while (kept := path.with_suffix(f".{number}.jsonl")).exists():
        number += 1
    path.rename(kept)
    log.info("%s held an older run: it is now %s", path.name, kept.name)


class Fanout:
    """Several sinks as one. A sink that raises is closed and left out from then on, with one warning."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self.sinks = list(sinks)

    def write(self, row: Row) -> None:
        """Give the row to every sink."""
        for sink in list(self.sinks):
            self._guarded(sink, lambda sink=sink: sink.write(row))  # type: ignore[misc]

    def close(self) -> None:
        """Close every sink."""
        for sink in list(self.sinks):
            self._guarded(sink, sink.close)

    def _guarded(self, sink: Sink, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a sink does wrong must not end the training run
            self.sinks.remove(sink)
            warnings.warn(
                f"the sink {type(sink).__name__} is switched off: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
