"""The first page of plots as one PNG: small multiples over the step axis, where matplotlib is installed.

Colours are Okabe and Ito's (distinct for every common kind of colour blindness), and two lines in one panel
also differ in width, markers or dashes, so that the page reads in grey. Only panels with data are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastmon.report.runlog import RunLog, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#D55E00", "#009E73", "#C1272D", "#6B7280"
INK = "#1F2933"


@dataclass(frozen=True)
class Line:
    """One metric in a panel: `marker` for sparse ones (validation), `smooth` for a median on pale values."""

    metric: str
    label: str
    colour: str = BLUE
    dashed: bool = False
    marker: bool = False
    smooth: bool = False


@dataclass(frozen=True)
class Panel:
    """One plot: title, unit on the y axis, lines; a log y axis or not; non-finite steps marked or not."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    log: bool = False
    mark_nonfinite: bool = False


PANELS = (
    Panel(
        "Loss",
        "nats per token",
        (
            Line("Loss/train_loss", "train", BLUE, smooth=True),
            Line("Loss/val_loss", "validation", ORANGE, marker=True),
        ),
        mark_nonfinite=True,
    ),
    Panel("Learning rate", "per step", (Line("Optimization/lr", "first group"),)),
    Panel(
        "Gradient norm",
        "L2, log scale",
        (
            Line("Optimization/grad_norm", "before clipping", BLUE),
            Line("Optimization/grad_norm_clipped", "after clipping", ORANGE, dashed=True),
        ),
        log=True,
        mark_nonfinite=True,
    ),
    Panel(
        "Spectral norm of hidden matrices",
        "sigma_max",
        (
            Line("Model/spectral_norm_max", "largest", BLUE),
            Line("Model/spectral_norm_mean", "mean", GREEN, dashed=True),
        ),
    ),
    Panel(
        "Update ratio",
        "rms update / rms weight, log scale",
        (Line("Optimization/update_ratio", "largest", BLUE, smooth=True),),
        log=True,
    ),
    Panel("Step time", "ms", (Line("Time/step_ms", "step", BLUE, smooth=True),)),
)


def draw(
    log: RunLog,
    out: Path,
    *,
    title: str,
) -> bool:
    """Draw every panel that has data into `out` (PNG, 150 dpi). False when the log holds nothing to draw.

    Raises ImportError when matplotlib is missing (extra `fastmon[plots]`). Uses a Figure of its own, never
    pyplot: no global state, no display.
    """
    from matplotlib.figure import Figure

    panels = [(panel, found) for panel in PANELS if (found := _lines(panel, log))]
    if not panels:
        return False
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    figure = Figure(
        figsize=(5.4 * columns, 2.7 * rows + 0.5), dpi=150, layout="constrained", facecolor="white"
    )
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK, x=0.01, ha="left")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    bad_steps = sorted({step for step, _, _ in log.nonfinite})
    for axes, (panel, lines) in zip(grid, panels, strict=False):
        _draw_panel(axes, panel, lines, bad_steps if panel.mark_nonfinite else ())
    for axes in list(grid)[len(panels) :]:
        axes.set_axis_off()
    figure.align_ylabels()
    figure.savefig(out)
    return True


def _lines(panel: Panel, log: RunLog) -> list[tuple[Line, Series]]:
    """The panel's lines that have a value to show (positive ones only, on a logarithmic axis)."""
    found = []
    for line in panel.lines:
        series = log.series(line.metric)
        if panel.log:
            kept = [
                (step, value) for step, value in zip(series.steps, series.values, strict=True) if value > 0
            ]
            series = Series([step for step, _ in kept], [value for _, value in kept])
        if series.steps:
            found.append((line, series))
    return found


def _draw_panel(
    axes: Axes,
    panel: Panel,
    lines: Sequence[tuple[Line, Series]],
    bad_steps: Sequence[int],
) -> None:
    """One panel: lines, legend where needed, a light grid, a tick on the top edge per non-finite step."""
    for line, series in lines:
        _draw_line(axes, line, series)
    axes.set_title(panel.title, fontsize=10, fontweight="bold", color=INK, loc="left")
    axes.set_ylabel(panel.unit, fontsize=8, color=GREY)
    axes.set_xlabel("step", fontsize=8, color=GREY)
    if panel.log:
        _logarithmic(axes)
    low, high = _limits([value for _, series in lines for value in series.values], log=panel.log)
    axes.set_ylim(low, high)
    hidden = sum(value > high for _, series in lines for value in series.values)
    if hidden:
        note = f"{hidden} value{'s' if hidden > 1 else ''} above the axis"
        axes.annotate(
            note, (0.99, 0.96), xycoords="axes fraction", ha="right", va="top", fontsize=7, color=GREY
        )
    if bad_steps:
        axes.vlines(
            bad_steps, 0.94, 1.0, transform=axes.get_xaxis_transform(), color=RED, lw=1.5, label="non-finite"
        )
    if len(lines) > 1 or bad_steps:
        axes.legend(fontsize=8, frameon=False, loc="best" if not hidden else "center right", labelcolor=INK)
    axes.grid(True, color="#E5E7EB", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=8, colors=GREY, length=0)
    if not panel.log:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5), useMathText=True)
        axes.yaxis.get_offset_text().set_fontsize(8)
    axes.margins(x=0.01)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#C5CBD3")


def _logarithmic(axes: Axes) -> None:
    """A log y axis whose ticks read 0.002, 0.5, 20 and stay few, over any number of decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 3.0, 5.0), numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_line(axes: Axes, line: Line, series: Series) -> None:
    """The raw values, and for a smoothed line a running median over them, which ignores single outliers."""
    style = "--" if line.dashed else "-"
    if line.smooth and len(series) >= 40:
        window = max(5, len(series) // 40)
        axes.plot(series.steps, series.values, color=line.colour, lw=0.8, alpha=0.4)
        axes.plot(
            series.steps,
            _running(series.values, window, _median),
            color=line.colour,
            lw=1.8,
            label=line.label,
        )
    elif line.marker:
        axes.plot(
            series.steps, series.values, style, color=line.colour, lw=1.4, marker="o", ms=4, label=line.label
        )
    else:
        axes.plot(series.steps, series.values, style, color=line.colour, lw=1.4, label=line.label)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _running(
    values: Sequence[float],
    window: int,
    reduce: Callable[[Sequence[float]], float],
) -> list[float]:
    """`reduce` over a centred window that shrinks at both ends, so the result is as long as the input."""
    half = window // 2
    return [reduce(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _limits(values: Sequence[float], *, log: bool) -> tuple[float, float]:
    """Axis limits that no start-up spike can flatten: cut where the maximum is over 3x 98th percentile."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    p98 = ordered[int(0.98 * (len(ordered) - 1))]
    if not log and high > 3 * p98 > 0:
        high = p98 * 1.1
    if log:
        return low / 1.3, high * 1.3
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (low - pad if low < 0 or low > 2 * pad else 0.0), high + pad
