from __future__ import annotations

import math
from dataclasses import dataclass

from temperament.parts import part
from temperament.protocols import Progress


@part("schedules.cosine")
@dataclass(frozen=True)
class Cosine:
    """Linear warm-up to `peak`, then half a cosine down to `end`.

    v = peak * (step + 1) / warmup                                        while step < warmup
    v = end + (peak - end) * (1 + cos(pi * s)) / 2                        s = (step - warmup) / (total - 1 - warmup)
    Source: Loshchilov and Hutter 2017 (SGDR), one cycle.
    """

    peak: float  # value after the warm-up
    end: float = 0.0  # value at the last step
    warmup: int = 0  # steps of linear warm-up from 0

    def __post_init__(self):
        if self.warmup < 0:
            raise ValueError("warmup must not be negative")

    def __call__(self, progress: Progress) -> float:
        if progress.step < self.warmup:
            return self.peak * (progress.step + 1) / self.warmup
        s = min((progress.step - self.warmup) / max(progress.total - 1 - self.warmup, 1), 1.0)
        return self.end + (self.peak - self.end) * (1 + math.cos(math.pi * s)) / 2
