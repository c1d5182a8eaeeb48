"""Scores to choose by: the skills of a run on development items, so that what was chosen is not measured on what chose it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from temperament.delta import Delta
from temperament.errors import UserError
from temperament.run import recipe as schema
from temperament.run.dial import Some
from temperament.run.skills import skills_of

AWAY = 10_007  # added to a suite's seed: other items than the ledger's


class Scorer:
    """score(delta) -> mean of the target skills of base + delta, up meaning better; `values` keeps every skill. Suites without
    a seed of their own (files) give the same items they are measured on; the part that chooses declares that it tunes on
    development data."""

    def __init__(self, recipe: schema.Recipe, base: Any, items: int, development: bool = True):
        spec = recipe.evaluation
        suites = [_away(s) for s in spec.suites] if development else list(spec.suites)
        own = replace(recipe, evaluation=replace(spec, suites=suites, items=items, keep=False))
        base.reset()
        self.base, self.some = base, Some(skills_of(own, base), items)
        if not self.some.targets:
            raise UserError(
                "evaluation.suites", None, "choosing by score needs a target skill: name one, e.g. evaluate.lab with a target"
            )
        self.zero = self.some.values()
        self.values: list[dict[str, float]] = []

    def __call__(self, delta: Delta) -> float:
        return self.some.worth(self.measured(delta))

    def summary(self, delta: Delta) -> dict[str, float]:
        """target, retained (means, 0..1), target_change, retained_change (percentage points against the base)."""
        return self.some.summary(self.measured(delta), self.zero)

    def measured(self, delta: Delta) -> dict[str, float]:
        """The mean of every skill of base + delta."""
        self.base.reset()
        self.base.apply(delta)
        try:
            found = self.some.values()
        finally:
            self.base.reset()
        self.values.append(found)
        return found


def _away(suite: Any) -> Any:
    return replace(suite, seed=suite.seed + AWAY) if any(f.name == "seed" for f in fields(suite)) else suite


def scorer(recipe: schema.Recipe, base: Any, items: int = 60) -> Callable[[Delta], float]:
    return Scorer(recipe, base, items)
