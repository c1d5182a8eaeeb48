"""What is measured: an outcome for each item, and a skill's outcomes on one model with how to read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from temperament import stats
from temperament.protocols import Outcome

Role = Literal["target", "retained", "other"]
Status = Literal["kept", "gained", "lost", "missed"]


@dataclass(frozen=True)
class SkillResult:
    """One skill measured on one model: its outcomes and how to read them.

    An item is *had* when its score reaches `passes`; kept, gained and lost count items had before and after. `bounds` None says
    the score is unbounded (perplexity, reward): no flips are counted. A set-level metric has `value` and `draws`, its values on
    `stats.resamples(n, ...)`, and no scores (see `set_level`). `floor` (name, value) stands in for a base without a score.
    """

    skill: str
    role: Role
    metric: str
    outcomes: tuple[Outcome, ...]
    higher_is_better: bool = True
    distance: Literal["near", "middle", "far"] | None = None  # from the target: near skills are lost first
    bounds: tuple[float, float] | None = (0.0, 1.0)
    passes: float | None = 0.5
    floor: tuple[str, float] | None = None
    value: float | None = None
    draws: tuple[float, ...] = ()
    unit: str | None = None  # "points" (shown times 100) for bounds (0, 1); else as given, e.g. "nats"

    @property
    def kind(self) -> Literal["item", "set"]:
        return "item" if self.value is None else "set"

    @property
    def shown_unit(self) -> str:
        return self.unit if self.unit is not None else "points" if self.bounds == (0.0, 1.0) else ""

    @cached_property
    def by_id(self) -> dict[str, Outcome]:
        return {o.id: o for o in self.outcomes}

    @property
    def mean(self) -> float | None:
        """The skill's one number: the set-level value, or the mean score of the items that have one."""
        if self.value is not None:
            return self.value
        scores = [o.score for o in self.outcomes if o.score is not None]
        return float(np.mean(scores)) if scores else None

    def had(self, score: float) -> bool:
        return (score >= self.passes) == self.higher_is_better


def set_level(
    skill: str, role: Role, metric: str, outcomes: Sequence[Outcome], value: Callable[[np.ndarray], float], **how: Any
) -> SkillResult:
    """A set-level metric: `value(indices)` over items, on all of them and on the resamples every row of this skill shares."""
    n = len(outcomes)
    draws = tuple(float(value(rows)) for rows in stats.resamples(n, skill, metric, draws=how.pop("draws", 400)))
    whole = float(value(np.arange(n)))
    return SkillResult(skill, role, metric, tuple(outcomes), value=whole, draws=draws, passes=None, **{"bounds": None, **how})


def by_skill(results: Iterable[SkillResult]) -> dict[str, SkillResult]:
    return {r.skill: r for r in results}


def status(how: SkillResult, before: Outcome | None, after: Outcome | None) -> Status | None:
    """kept (had, has), gained (had not, has), lost (had, has not), missed (neither); None where items do not pass or fail."""
    scores = [o.score if o is not None else None for o in (before, after)]
    if how.passes is None or None in scores:
        return None
    had, has = (how.had(s) for s in scores)
    return ("kept" if has else "lost") if had else ("gained" if has else "missed")
