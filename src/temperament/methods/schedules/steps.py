from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from temperament.parts import part
from temperament.protocols import Progress


@part("schedules.steps")
@dataclass(frozen=True)
class Steps:
    """A value for each stretch of training: values[i] from share `at[i]` on.

    Also a value a round (`by: round`): values[min(round, last)], as SPIN's growing beta.
    """

    values: tuple[float, ...]  # the values, in order
    at: tuple[float, ...] = ()  # share of training where each value after the first begins
    by: str = "share"  # "share" of training, or "round"

    def __post_init__(self):
        if self.by not in ("share", "round"):
            raise ValueError("by is 'share' or 'round'")
        if not self.values:
            raise ValueError("values must name at least one")
        if self.by == "share" and len(self.at) != len(self.values) - 1:
            raise ValueError(f"{len(self.values)} values need {len(self.values) - 1} borders in `at`, got {len(self.at)}")
        if any(a >= b for a, b in pairwise(self.at)):
            raise ValueError("the borders in `at` must grow")

    def __call__(self, progress: Progress) -> float:
        k = progress.round if self.by == "round" else sum(progress.share >= a for a in self.at)
        return self.values[min(k, len(self.values) - 1)]
