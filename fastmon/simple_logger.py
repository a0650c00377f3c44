"""SimpleLogger: a loop's own numbers to the console, a run folder and Weights & Biases, without a Monitor."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmon.sinks import Console, Fanout, Jsonl, Row


class SimpleLogger:
    """Writes what it is given; observes nothing.

    Files go to `runs/<experiment_name, or project_name>`; `config` becomes part of the first line there.
    use_wandb: log to Weights & Biases as well. ImportError where wandb is not installed.
    """

    def __init__(
        self,
        use_wandb: bool,
        project_name: str,
        experiment_name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._wandb: Any = None
        if use_wandb:
            try:
                import wandb
            except ImportError:
                raise ImportError("use_wandb=True wants wandb: pip install 'fastmon[wandb]'") from None
            self._wandb = wandb.init(project=project_name, name=experiment_name, config=dict(config or {}))
        self._console = Console(log_interval=1)
        folder = Path("runs") / (experiment_name or project_name)
        self._printed = Fanout([self._console])
        self._files = Fanout([Jsonl(folder, header={"config": dict(config or {})})])
        self._step = 0

    def log_step(
        self,
        step: int,  # counted from 1
        total_steps: int | None = None,
        *,
        train_loss: float | None = None,
        val_loss: float | None = None,
        train_time_ms: float | None = None,  # of all steps so far
    ) -> None:
        """One console line, `step:10/100 val_loss:3.2847 train_time:1804.2ms step_avg:180.42ms`, and one row."""
        self._console.total_steps = total_steps
        given = {
            "Loss/train_loss": train_loss,
            "Loss/val_loss": val_loss,
            "Time/training_time_ms": train_time_ms,
        }
        values = {name: float(value) for name, value in given.items() if value is not None}
        if train_time_ms is not None:
            values["Time/step_avg_ms"] = train_time_ms / max(step, 1)
        self._printed.write(Row(step, values=values))
        self.log(values, step)

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        """One row of any names, not printed; step: default the last one logged."""
        self._step = self._step if step is None else step
        row = Row(self._step, time.time(), values={name: float(value) for name, value in values.items()})
        self._files.write(row)
        if self._wandb is not None:
            self._wandb.log(row.values, step=row.step)

    def close(self) -> None:
        """Flush and close everything."""
        self._printed.close()
        self._files.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
