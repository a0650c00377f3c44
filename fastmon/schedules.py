"""Shapes over a run: a factor of the peak value as a function of how far the run has come.

Pure functions of the step, so a schedule has no state: a resumed run asks for the factor of its next step. No torch.
"""

import math
from collections.abc import Callable

SHAPES: dict[str, Callable[[float, float], float]] = {  # factor at t in [0, 1]: 1 at t = 0, `low` at t = 1
    "constant": lambda t, low: 1.0,
    "linear": lambda t, low: 1 - (1 - low) * t,
    "cosine": lambda t, low: low + (1 - low) * (1 + math.cos(math.pi * t)) / 2,
    "wsd": lambda t, low: (
        1 - (1 - low) * max(0.0, 5 * t - 4)
    ),  # warm-up, stable, decay: the last fifth decays
    "inverse-sqrt": lambda t, low: (
        (1 + t * (max(low, 0.01) ** -2 - 1)) ** -0.5
    ),  # never reaches 0: 0.01 at least
}


def factor(
    shape: str,
    step: int,  # counted from 1
    *,
    steps: int,  # of the whole run
    warmup: int,  # steps of linear rise from 0; the step `warmup` has factor 1
    low: float,  # factor of the last step; "constant" ignores it
) -> float:
    """Return the factor of `step`: linear warm-up, then the shape. A warm-up longer than the run never ends."""
    if step <= warmup:
        return step / warmup
    return SHAPES[shape]((step - warmup) / (steps - warmup), low)
