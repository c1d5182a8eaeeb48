"""The dial: after any run its strength is swept, and "lose at most 0.5 points" is answered with a point, without retraining.

    for each shape (merge.linear: all blocks alike; merge.lines: shallow ones less) and strength s:
        base + shape(delta, s)  ->  gain on the targets, change of the retained skills, both against the base

The best point gains most on the targets among those whose retained skills lose no more than the budget on average; strength 0
is the base and always qualifies, so there is always an answer. Where the model paints, each point keeps a few pictures: the
same captions from the same noise at every strength.

With `keep`, a file, every point is on disk as soon as it is measured, under the address of all that it depends on (the recipe,
the base, the change, the skills and their items): a sweep that was stopped, or is asked for more strengths, measures only what
is missing, and nothing of another sweep is taken for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from temperament import parts
from temperament.delta import Delta
from temperament.errors import UserError
from temperament.protocols import Outcome, Shape
from temperament.run.artefacts import address
from temperament.run.skills import level
from temperament.train.checkpoint import write_atomic


def dial(
    skills: Any, delta: Delta, spec: Any, tell: Callable[..., None] = lambda event, **data: None, keep: Path | None = None
) -> dict[str, Any]:
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
    book = Book(keep, "" if keep is None else address(skills.key(f"{base.sha256} {base.reading}"), delta.digest, spec.items))

    def measured(change: Delta | None = None) -> dict[str, Any]:
        base.reset()
        if change is not None:
            base.apply(change)
        return {"skills": some.values(), "pictures": some.painted}

    if book.base is None:
        book.base = measured()
        book.write()
    zero, points = book.base, []
    for name in spec.shape:
        shape = parts.build(name, Shape, "evaluation.dial.shape")
        for s in spec.strengths:
            if (point := book.points.get((name, s))) is None:
                # merge.linear at 0 is the base itself; other shapes at 0 still change the deep blocks
                at_base = s == 0 and name == "merge.linear"
                found = zero if at_base else measured(shape.scale_delta(delta, s, base.places))
                point = {
                    "shape": name,
                    "strength": s,
                    **some.summary(found["skills"], zero["skills"]),
                    "skills": found["skills"],
                }
                point |= {"pictures": found["pictures"]} if found["pictures"] else {}
                book.points[name, s] = point
                book.write()
            points.append(point)
            tell("dial", point=point)
    base.reset()
    best = choose(points, spec.budget)
    told = {"best": best, "budget": spec.budget, "items": spec.items}
    book.write(**told)
    return {"points": points, **told}


class Book:
    """The base and the points measured so far, of one sweep; on disk where a file is named."""

    def __init__(self, file: Path | None, key: str):
        self.file, self.key, self.base, self.points = file, key, None, {}
        if file is None:
            return
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            if held["key"] == key:
                self.base, self.points = held["base"], {(p["shape"], p["strength"]): p for p in held["points"]}
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none yet, or none of ours: it is begun again

    def write(self, **told: Any) -> None:
        if self.file is not None:
            held = {"key": self.key, "base": self.base, "points": list(self.points.values()), **told}
            write_atomic(self.file, json.dumps(held, indent=1))


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
