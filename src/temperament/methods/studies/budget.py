from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from typing import Any

from temperament.errors import UserError
from temperament.parts import part
from temperament.stats import t_interval

SIZES = ("rows", "limit", "episodes")  # how sources call the number of rows they give


@dataclass(frozen=True)
class Split:
    """How one budget is spent."""

    budget: float
    share: float
    demonstrations: int
    preferences: int

    def where(self, seed: int) -> tuple[str, int]:
        """The address of its run."""
        return f"{self.budget:g} at {self.share:g}", seed


@part("studies.budget", papers=["122"])
@dataclass(frozen=True)
class Budget:
    """One budget for annotation: how much of it for demonstrations, how much for preferences?

        preferences = s B / c_pref;    demonstrations = (1 - s) B / c_sft              B budget, s share, c what a row costs

    The recipe has a train step on demonstrations and after it one on pairs; each budget and share runs both, on that many
    rows of their sources, over several seeds. s = 0 leaves the second step out, s = 1 the first, so that preferences are
    learnt from the base (its reference). What rounding leaves over is less than a row. Give the steps `epochs`, so that more
    rows are more steps. Read: the target for every split with a t interval over seeds, the best share of each budget, and
    what that advises. Source: Raghavendra et al. 2025 (paper 122): below a thousand rows all on demonstrations; above, more
    and more on preferences."""

    budgets: list[float]  # what may be spent, in the unit of the costs
    shares: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])  # of it on preferences
    cost_sft: float = 1.0  # of a demonstration
    cost_pref: float = 1.0  # of a preference
    seeds: list[int] = field(default_factory=lambda: [0])  # each split runs once a seed

    def __post_init__(self):
        if not (self.budgets and self.shares and self.seeds):
            raise ValueError("budgets, shares and seeds each need at least one entry")
        if min(self.cost_sft, self.cost_pref) <= 0 or not all(0 <= s <= 1 for s in self.shares):
            raise ValueError("costs are above 0, shares between 0 and 1")
        if min(self.budgets) < max(self.cost_sft, self.cost_pref):
            raise ValueError("a budget buys at least one row of either kind")

    def split(self, budget: float, share: float) -> Split:
        """In whole rows: never over the budget, and what is left buys no further row of the kind that takes what is left."""
        B, s, c_sft, c_pref = (Fraction(str(v)) for v in (budget, share, self.cost_sft, self.cost_pref))
        pairs = int(s * B / c_pref)
        return Split(budget, share, int((B - pairs * c_pref) / c_sft) if s < 1 else 0, pairs)

    def plan(self, recipe: Any, done: dict[tuple, Any]) -> Iterator[tuple[tuple, Any]]:
        """((budget and share, seed), recipe) of every run; two shares that buy the same rows are one run."""
        taught, preferred = stages(recipe)
        for budget in self.budgets:
            for split in self.splits(budget):
                for seed in self.seeds:
                    yield split.where(seed), variant(recipe, split, taught, preferred, seed)

    def splits(self, budget: float) -> list[Split]:
        found = [self.split(budget, s) for s in sorted(set(self.shares))]
        return list({(s.demonstrations, s.preferences): s for s in reversed(found)}.values())[::-1]

    def read(self, runs: dict[tuple, Any]) -> dict[str, Any]:
        """{"splits": [{budget, share, rows of each, target, interval, ...}], "best": one a budget, "advice", "seeds"}."""
        rows = []
        for budget in self.budgets:
            for split in self.splits(budget):
                mine = [runs[k] for seed in self.seeds if (k := split.where(seed)) in runs]
                row: dict[str, Any] = {
                    "budget": budget,
                    "share": split.share,
                    "demonstrations": split.demonstrations,
                    "preferences": split.preferences,
                    "runs": len(mine),
                }
                row["unit"] = mine[0]["unit"] if mine else "points"
                for what in ("target", "worth", "gain", "retained", "loss", "nll", "kl", "steps", "seconds"):
                    values = [m[what] for m in mine if m.get(what) is not None]
                    row[what], row[f"{what}_ci95"] = t_interval(values) if values else (None, None)
                rows.append(row)
        measured = [r for r in rows if r["target"] is not None]
        best = [
            max(of, key=lambda r: (r["worth"], -r["share"]))
            for b in self.budgets
            if (of := [r for r in measured if r["budget"] == b])
        ]
        return {"splits": rows, "best": best, "advice": advice(best), "seeds": list(self.seeds)}

    def frontier(self, finding: dict[str, Any]) -> dict[str, Any]:
        """For the picture: a line for every budget, the target over the share that went into preferences."""
        of = lambda b: [r for r in finding["splits"] if r["budget"] == b and r["target"] is not None]
        lines = [
            {"name": f"budget {b:g}", "x": [r["share"] for r in of(b)], "y": [r["target"] for r in of(b)]} for b in self.budgets
        ]
        as_is = lambda r: {"target": r["target"], "ci95": r["target_ci95"], "unit": r["unit"]}
        named = lambda r: {"budget": f"{r['budget']:g}", "best": f"{r['share']:g}"} | as_is(r)
        table = [named(r) | {"rows": f"{r['demonstrations']} + {r['preferences']}"} for r in finding["best"]]
        return {
            "title": "One budget, two kinds of rows",
            "x_label": "share spent on preferences",
            "rows_label": "demonstrations + preferences",
            "lines": lines,
            "best": table,
            "said": finding["advice"],
        }

    def chosen(self, finding: dict[str, Any], runs: dict[tuple, Any]) -> tuple | None:
        """The run that is shown item by item: the best split of the largest budget, first seed."""
        if not finding["best"]:
            return None
        row = max(finding["best"], key=lambda r: r["budget"])
        return self.split(row["budget"], row["share"]).where(self.seeds[0])


def stages(recipe: Any) -> tuple[str, str]:
    """Names of the step that learns from demonstrations and of the one, after it, that learns from preferences."""
    takes = lambda step, kind: step.train and kind in getattr(step.train.objective, "batch", ())
    taught = next((i for i, s in enumerate(recipe.steps) if takes(s, "Tokens")), None)
    preferred = next((i for i, s in enumerate(recipe.steps) if takes(s, "Pairs")), None)
    if taught is None or preferred is None or preferred < taught:
        raise UserError(
            "steps",
            [s.name for s in recipe.steps],
            "a budget is split between a train step on demonstrations and, after it, one on pairs: give both",
        )
    return recipe.steps[taught].name, recipe.steps[preferred].name


def variant(recipe: Any, split: Split, taught: str, preferred: str, seed: int) -> Any:
    """The recipe with that many rows in either step; a step without rows is left out."""
    rows, steps = {taught: split.demonstrations, preferred: split.preferences}, []
    for step in recipe.steps:
        if rows.get(step.name) == 0:
            continue
        if step.name in rows:
            step = replace(
                step, train=replace(step.train, source=limited(step.train.source, rows[step.name], f"{step.name}.train.source"))
            )
        if step.start in rows and rows[step.start] == 0:
            step = replace(step, start="previous")
        steps.append(step)
    steps[-1] = replace(steps[-1], ledger=True)  # where it ends is measured, whichever step that is
    return replace(recipe, steps=steps, seed=seed, study=None)


def limited(source: Any, n: int, field: str) -> Any:
    """The source with its first n rows."""
    size = next((f.name for f in fields(source) if f.name in SIZES), None)
    name = type(source).part_name
    if size is None:
        raise UserError(field, name, "this source cannot be told how many rows to give; use data.file or data.lab")
    if getattr(source, "holdout", 0):
        raise UserError(
            f"{field}.{name}.holdout",
            source.holdout,
            "a budget counts the rows that are trained on: set holdout: 0, and name a suite in evaluation",
        )
    return replace(source, **{size: n})


def advice(best: list[dict[str, Any]]) -> str:
    """The best share of every budget, in a sentence or two."""
    if not best:
        return "Nothing was measured: there is no advice."
    tell = lambda r: (
        "all on demonstrations"
        if r["share"] == 0
        else "all on preferences"
        if r["share"] == 1
        else f"{100 * r['share']:g} % on preferences"
    )
    level = lambda r: f"{100 * r['target']:.0f} %" if r["unit"] == "points" else f"{r['target']:.3f} {r['unit']}"
    words = [f"of {r['budget']:g}, {tell(r)} ({level(r)} on the target)" for r in best]
    shares = [r["share"] for r in sorted(best, key=lambda r: r["budget"])]
    grows = len(shares) > 1 and shares[-1] > shares[0] and shares == sorted(shares)
    return f"Best spent: {'; '.join(words)}." + (" The larger the budget, the more of it for preferences." if grows else "")
