"""The dial: after any run its strength is swept, and "lose at most 0.5 points" is answered with a point, without retraining.

    for each shape (merge.linear: all blocks alike; merge.lines: shallow ones less) and strength s:
        base + shape(delta, s)  ->  gain on the targets, change of the retained skills, both against the base

The best point gains most on the targets among those whose retained skills lose no more than the budget on average; strength 0
is the base and always qualifies, so there is always an answer. Where the model paints, each point keeps a few pictures: the
same captions from the same noise at every strength.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from temperament import parts
from temperament.delta import Delta
from temperament.errors import UserError
from temperament.protocols import Outcome, Shape
from temperament.run.skills import level


def dial(skills: Any, delta: Delta, spec: Any, tell: Callable[..., None] = lambda event, **data: None) -> dict[str, Any]:
    """Sweep `delta` on the base of `skills` (run.tune.Skills); spec: recipe.Dial. Points are dicts of strength, shape, target,
    retained (means over skills, 0..1 or the measure's unit) and each skill's own value; changes are in percentage points, or
    hundredths of the unit, up meaning better."""
    base, some = skills.base, Some(skills, spec.items)
    if not some.targets:
        raise UserError(
            "evaluation.dial",
            "no target skill",
            "the dial weighs gain against loss; name what is taught, e.g. evaluate.file with role: target",
        )
    base.reset()
    zero = some.values()
    painted, points = some.painted, []
    for name in spec.shape:
        shape = parts.build(name, Shape, "evaluation.dial.shape")
        for s in spec.strengths:
            # merge.linear at 0 is the base itself; other shapes at 0 still change the deep blocks
            if s == 0 and name == "merge.linear":
                values, some.painted = zero, painted
            else:
                base.reset()
                base.apply(shape.scale_delta(delta, s, base.places))
                values = some.values()
            points.append({"shape": name, "strength": s, **some.summary(values, zero), "skills": values})
            if some.painted:
                points[-1]["pictures"] = some.painted
            tell("dial", point=points[-1])
    base.reset()
    best = choose(points, spec.budget)
    return {"points": points, "best": best, "budget": spec.budget, "items": spec.items}


def choose(points: list[dict[str, Any]], budget: float) -> dict[str, Any]:
    """Among points that lose at most `budget` percentage points on the retained skills: most target, then least loss, then
    strength."""
    within = [p for p in points if p["retained_change"] >= -budget - 1e-9] or [max(points, key=lambda p: p["retained_change"])]
    return max(within, key=lambda p: (p["target_change"], p["retained_change"], p["strength"]))


def scaled(delta: Delta, point: dict[str, Any], places: Any) -> Delta:
    """The change at a point of the dial: what is baked in."""
    return parts.build(point["shape"], Shape, "shape").scale_delta(delta, point["strength"], places)


class Some:
    """The first items of every skill, and their means; skills without a bounded score take part by their own graded measure
    only."""

    def __init__(self, skills: Any, items: int):
        self.all = skills
        self.skills = [s.some(items) for s in skills.skills]
        self.targets = [s.name for s in self.skills if s.role == "target"]
        self.sign = {s.name: 1 if s.how.get("higher_is_better", True) else -1 for s in self.skills}
        self.retained = [s.name for s in self.skills if s.role == "retained" and not s.how.get("unit")]
        self.painted: list[dict[str, str]] = []  # of the last look

    def values(self) -> dict[str, float]:
        system, out, self.painted = self.all.system(graded=False), {}, []
        for s in self.skills:
            outcomes = s.measure(system)
            out[s.name] = level(s, outcomes)
            self._keep(s, outcomes)
        return out

    def _keep(self, skill: Any, outcomes: Sequence[Outcome]) -> None:
        """The first pictures of a skill that paints: two of a target, one of the others, eight in all."""
        made = [o for o in outcomes if o.extra.get("image")][: 2 if skill.role == "target" else 1]
        told = [{"skill": skill.name, "caption": o.prompt, "image": o.extra["image"]} for o in made]
        self.painted += told[: 8 - len(self.painted)]

    def worth(self, values: dict[str, float]) -> float:
        """Mean of the targets, up meaning better: of nats less is."""
        return sum(self.sign[n] * values[n] for n in self.targets) / max(len(self.targets), 1)

    def summary(self, values: dict[str, float], zero: dict[str, float]) -> dict[str, float]:
        mean = lambda names, of: sum(of[n] for n in names) / max(len(names), 1)
        target, retained = mean(self.targets, values), mean(self.retained, values)
        return {"target": target, "retained": retained, "target_change": 100 * (self.worth(values) - self.worth(zero)),
                "retained_change": 100 * (retained - mean(self.retained, zero))}  # fmt: skip
