"""Gradient noise scale from accumulation (McCandlish et al., arXiv 1812.06162, appendix A.1).

With losses divided by K, K^2 |gradient after the first micro-batch|^2 has the expectation |G|^2 + tr(Sigma) / b, and
|final gradient|^2 has |G|^2 + tr(Sigma) / B, with b and B in samples and the same weights. So
    |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b),     S = (|g_b|^2 - |g_B|^2) / (1/b - 1/B),
and noise_scale = EMA(S) / EMA(|G|^2). Each step's two numbers are noisy and may be negative; their averages are taken
apart, and the ratio is absent while it is not positive. Cost: one more read of the gradients, after the first
micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from fastmon.monitors import Base, Scene
from fastmon.readback import Numbers, global_norm
from fastmon.sinks import Row

NOISE_SCALE = "Gradients/noise_scale"
DECAY = 0.99  # of both averages: about the last hundred steps


class NoiseScale(Base):
    """Two norms a step, two averages, one ratio. Needs `samples_per_step` and at least two micro-batches."""

    FILLS: ClassVar[tuple[str, ...]] = (NOISE_SCALE,)

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self._due = False
        self._first: Any = None  # Reading after the first micro-batch
        self._scale: Tensor | None = None
        self._micro_steps = 0
        self._ranks = 1
        self._noise = self._signal = 0.0  # averages from 0: the same bias in both, which cancels in the ratio

    def begin(self, due: frozenset[str]) -> None:
        """Forget the step before."""
        self._due = NOISE_SCALE in due and self.scene.samples_per_step is not None
        self._first, self._micro_steps = None, 0

    def micro_step(self, reduced: bool) -> None:
        """Read the gradients of the first micro-batch."""
        self._micro_steps += 1
        if self._due and self._micro_steps == 1:
            self._first = self.scene.reader.read()
            scale = getattr(self.scene.scaler, "_scale", None)  # the final gradient will be unscaled
            self._scale = scale.detach().clone().reshape(1) if isinstance(scale, Tensor) else None
            self._ranks = 1 if reduced else self.scene.world_size

    def enqueue(self, due: frozenset[str]) -> tuple[Sequence[Tensor], Any]:
        """The norms of the small batch; the large one's are on the tape already."""
        samples = self.scene.samples_per_step
        if self._first is None or samples is None:
            return (), None
        k = self._micro_steps + 1
        parts = [self._first.l2] if self._scale is None else [self._first.l2 / self._scale]
        return parts, (k, samples / (k * self._ranks), samples)

    def decode(self, numbers: Numbers, note: Any, row: Row) -> None:
        """Update both averages. A step with a non-finite gradient does not count, nor one whose norm before clipping
        nobody has read.
        """
        total = row.shared.get("grad_norm")
        if note is None or total is None:
            return
        k, small, large = note
        small_square, large_square = (k * global_norm(numbers)) ** 2, total**2
        noise = (small_square - large_square) / (1 / small - 1 / large)
        signal = (large * large_square - small * small_square) / (large - small)
        if abs(noise) + abs(signal) < float("inf"):
            self._noise = DECAY * self._noise + (1 - DECAY) * noise
            self._signal = DECAY * self._signal + (1 - DECAY) * signal
        if self._signal > 0 and self._noise > 0:
            row.values[NOISE_SCALE] = self._noise / self._signal

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return {"noise": self._noise, "signal": self._signal}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on averaging."""
        self._noise, self._signal = state["noise"], state["signal"]
