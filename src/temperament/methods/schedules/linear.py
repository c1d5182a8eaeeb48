from __future__ import annotations

from dataclasses import dataclass

from temperament.parts import part
from temperament.protocols import Progress


@part("schedules.linear")
@dataclass(frozen=True)
class Linear:
    """A straight line from `start` to `end` over the share of training [begin, until]; flat outside.

    v(s) = start + (end - start) * clamp((s - begin) / (until - begin), 0, 1), s = share of training done.
    With `warmup` steps the value is first raised linearly from 0.
    """

    start: float  # value at the beginning
    end: float = 0.0  # value at the end
    begin: float = 0.0  # share of training at which the line begins
    until: float = 1.0  # share of training at which the line ends
    warmup: int = 0  # steps of linear warm-up from 0

    def __post_init__(self):
        if self.warmup < 0:
            raise ValueError("warmup must not be negative")

    def __call__(self, progress: Progress) -> float:
        along = min(max((progress.share - self.begin) / max(self.until - self.begin, 1e-12), 0.0), 1.0)
        warm = min(1.0, (progress.step + 1) / self.warmup) if self.warmup else 1.0
        return warm * (self.start + (self.end - self.start) * along)
