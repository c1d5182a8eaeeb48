from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

from temperament.errors import UserError
from temperament.parts import build, part
from temperament.protocols import Trainable
from temperament.stats import t_interval

NUMBERS = ("target", "worth", "gain", "retained", "loss", "near_loss", "nll", "kl", "steps", "seconds", "parameters")


@dataclass(frozen=True)
class Arm:
    """One method of a comparison: what it trains, and its own rates."""

    trainable: list[Trainable]  # what is updated
    rates: list[float] = field(default_factory=list)  # tried on the first seed; empty: the recipe's times the method's factor


@part("studies.compare")
@dataclass(frozen=True)
class Compare:
    """Several methods on one task at matched gain: what did each lose?

    Every arm runs the recipe with its own trainable at its own learning rate and stops at the same level of the target (`stop`
    of the recipe's train step), over several seeds. With several rates an arm first tries each on the first seed and keeps the
    one that reached the level with the least loss (or came nearest to it). Read: gain and loss for each arm with a t interval
    over seeds, and the Pareto front.
    """

    arms: dict[str, Arm]  # by name
    seeds: list[int] = field(default_factory=lambda: [0])  # each arm runs once a seed

    def __post_init__(self):
        if not self.arms or not self.seeds:
            raise ValueError("a comparison needs at least one arm and one seed")

    def plan(self, recipe: Any, done: dict[tuple, Any]) -> Iterator[tuple[tuple, Any]]:
        """(address, recipe) of each run in order; `done` fills as they end, so that the best rate can be chosen from the first
        seed."""
        for name, arm in self.arms.items():
            rates = arm.rates or [None]
            for rate in rates:
                yield (name, self.seeds[0], rate), self.variant(recipe, arm, self.seeds[0], rate)
            best = self.best_rate(name, rates, done)
            for seed in self.seeds[1:]:
                yield (name, seed, best), self.variant(recipe, arm, seed, best)

    def best_rate(self, name: str, rates: list, done: dict[tuple, Any]) -> float | None:
        if len(rates) == 1:
            return rates[0]
        tried = [(done[name, self.seeds[0], r], r) for r in rates if (name, self.seeds[0], r) in done]
        reached = [t for t in tried if t[0]["reached"]]
        if reached:
            return max(reached, key=lambda t: (t[0]["retained"], -t[1]))[1]
        return max(tried, key=lambda t: (t[0]["worth"], t[0]["retained"]))[1] if tried else rates[0]

    def variant(self, recipe: Any, arm: Arm, seed: int, rate: float | None) -> Any:
        """The recipe with this arm's method in every train step."""
        steps = []
        for step in recipe.steps:
            if step.train:
                lr = rate if rate is not None else times(step.train.optimizer.lr, rate_factor(arm.trainable))
                train = replace(
                    step.train,
                    trainable=list(arm.trainable),
                    optimizer=replace(step.train.optimizer, lr=_as_rate(step.train.optimizer.lr, lr)),
                )
                step = replace(step, train=train)
            steps.append(step)
        return replace(recipe, steps=steps, seed=seed, study=None)

    def read(self, runs: dict[tuple, Any]) -> dict[str, Any]:
        """arm -> gain, loss and their intervals over seeds. Only the chosen rate of an arm is read."""
        arms = []
        for name, arm in self.arms.items():
            rate = self.best_rate(name, arm.rates or [None], runs)
            mine = [runs[name, s, rate] for s in self.seeds if (name, s, rate) in runs]
            if not mine:
                continue
            row: dict[str, Any] = {"name": name, "rate": rate, "runs": mine, "reached": all(m["reached"] for m in mine)}
            row["unit"] = mine[0]["unit"]
            for what in NUMBERS:
                values = [m[what] for m in mine if m.get(what) is not None]
                row[what], row[f"{what}_ci95"] = t_interval(values) if values else (None, None)
            arms.append(row)
        at = lambda row: (row["gain"] or 0.0, -(row["loss"] or 0.0))  # nothing measured: nothing gained, nothing lost
        for row in arms:
            row["front"] = not any(at(o) != at(row) and all(a >= b for a, b in zip(at(o), at(row), strict=True)) for o in arms)
        return {"arms": arms, "seeds": list(self.seeds)}

    def compared(self, finding: dict[str, Any]) -> dict[str, Any]:
        """For the picture: gain and loss (shares) of every run of every arm."""
        share = lambda points: None if points is None else points / 100
        points = [
            {
                "method": a["name"],
                "seed": s,
                "gain": share(m["gain"]),
                "loss": max(share(m["loss"]) or 0.0, 0.0),
                "seconds": m["seconds"],
                "parameters": m["parameters"],
            }
            for a in finding["arms"]
            for s, m in zip(finding["seeds"], a["runs"], strict=False)
        ]
        missed = [a["name"] for a in finding["arms"] if not a["reached"]]
        note = (
            "Every method stopped at the same level of the target."
            if not missed
            else f"{', '.join(missed)} did not reach the level of the target: read its loss beside its smaller gain."
        )
        return {"points": points, "note": note}

    def chosen(self, finding: dict[str, Any], runs: dict[tuple, Any]) -> tuple | None:
        """The run that is shown item by item: the arm that reached the level and lost least, first seed."""
        arms = [a for a in finding["arms"] if a["reached"]] or finding["arms"]
        best = min(arms, key=lambda a: (a["loss"] if a["loss"] is not None else 0.0, -(a["gain"] or 0.0)))
        return (best["name"], self.seeds[0], best["rate"])


def arms_of(methods: list[str], field: str = "--methods") -> dict[str, Arm]:
    """Arms from part names; a name may carry options as in a recipe."""
    arms = {}
    for m in methods:
        built = build(m, Trainable, field)
        name = type(built).part_name
        if name in arms:
            raise UserError(field, m, "named twice; give two arms of one method in a recipe")
        arms[name] = Arm([built])
    return arms


def rate_factor(trainable: list[Any]) -> float:
    """A method's usual rate over full fine-tuning's: what it says of itself (`rate_factor`), the largest of a stack."""
    return max(getattr(type(t), "rate_factor", 1.0) for t in trainable)


def times(lr: Any, factor: float) -> Any:
    """A rate, or a schedule of it, multiplied."""
    if isinstance(lr, (int, float)):
        return lr * factor
    scaled = {f.name: getattr(lr, f.name) for f in fields(lr)}
    for name in ("value", "peak", "start", "end"):
        if name in scaled:
            scaled[name] *= factor
    if "values" in scaled:
        scaled["values"] = tuple(v * factor for v in scaled["values"])
    return type(lr)(**scaled)


def _as_rate(old: Any, new: Any) -> Any:
    """A plain rate put into the recipe's own schedule; a schedule as it is."""
    if isinstance(new, (int, float)) and not isinstance(old, (int, float)):
        top = (
            max(old.values)
            if hasattr(old, "values")
            else next(getattr(old, n) for n in ("peak", "start", "value") if hasattr(old, n))
        )
        return times(old, new / top)
    return new
