from __future__ import annotations

from dataclasses import dataclass

from temperament.parts import part
from temperament.protocols import Progress


@part("schedules.constant")
@dataclass(frozen=True)
class Constant:
    """One value, after a linear warm-up from 0: v * min(1, (step + 1) / warmup)."""

    value: float  # the value after the warm-up
    warmup: int = 0  # steps of linear warm-up from 0

    def __post_init__(self):
        if self.warmup < 0:
            raise ValueError("warmup must not be negative")

    def __call__(self, progress: Progress) -> float:
        return self.value * min(1.0, (progress.step + 1) / self.warmup if self.warmup else 1.0)
