from __future__ import annotations

from dataclasses import dataclass

from temperament.parts import part
from temperament.protocols import Progress


@part("schedules.wsd")
@dataclass(frozen=True)
class WarmupStableDecay:
    """Warm-up, a plateau, and a linear decay over the last share of training.

    v = min(1, (step + 1) / warmup) * (end + (peak - end) * min(1, (1 - s) / decay))          s = share of training done
    Source: Hu et al. 2024 (MiniCPM), the warmup-stable-decay schedule.
    """

    peak: float  # value of the plateau
    end: float = 0.0  # value at the last step
    warmup: int = 0  # steps of linear warm-up from 0
    decay: float = 0.2  # share of training, at its end, over which the value falls

    def __post_init__(self):
        if self.warmup < 0:
            raise ValueError("warmup must not be negative")

    def __call__(self, progress: Progress) -> float:
        warm = min(1.0, (progress.step + 1) / self.warmup) if self.warmup else 1.0
        fall = min(1.0, (1 - progress.share) / self.decay) if self.decay else 1.0
        return warm * (self.end + (self.peak - self.end) * fall)
