"""Measuring a model outside of a run: one column of numbers, or before and after where it is a base with a change on it, or
with inference parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from temperament import parts
from temperament.engine.measure import Pure
from temperament.errors import UserError, nearest
from temperament.protocols import Suite
from temperament.run import recipe as schema
from temperament.run.ledger import Ledger
from temperament.run.reopen import subject
from temperament.run.skills import Skills, skills_of


def evaluate(
    model: Any,
    suites: Sequence[Any] = (),
    *,
    items: int = 100,
    batch: int = 64,
    seed: int = 0,
    device: str = "auto",
    tell: Callable[..., None] = lambda event, **data: None,
) -> dict[str, Any]:
    """{"model", "skills": [{name, role, metric, n, value, ci95, nll, kl}], "ledger"}; `ledger` for a base with a change on it.

    suites: parts of the evaluate room, their names with or without the room, or files of test rows; empty: the keep set.
    """
    if items < 1 or batch < 1:
        raise UserError("--items" if items < 1 else "--batch", min(items, batch), "give at least 1")
    built = [suite(s) for s in suites]
    base = subject(model, device)
    spec = schema.Evaluation(suites=built, items=items, batch=batch, keep=not built)
    recipe = schema.Recipe(base=base.id, seed=seed, evaluation=spec, inference=base.inference)
    with base.at("base"):  # the keep set is what the pure base writes
        skills = skills_of(recipe, base)
    rows = {}
    if base.originals or base.hung or base.inference:
        rows["base"] = measured(skills.alone(), Pure(base), tell, "base")
    rows["model"] = measured(skills, None, tell, "model")
    ledger = Ledger(rows)
    told = [_level(ledger.change(s, "model", "model")) for s in ledger.skills]
    return {
        "model": str(model) if isinstance(model, (str, Path)) else base.id,
        "base": {"id": base.id, "sha256": dict(base.sha256)},
        "skills": told,
    } | ({"ledger": ledger.to_json()} if len(rows) > 1 else {})


def measured(skills: Skills, model: Any, tell: Callable[..., None], row: str) -> dict[str, Any]:
    outcomes, system = [], skills.system(model)
    for i, skill in enumerate(skills.skills):
        tell("measure", skill=skill.name, done=i, total=len(skills.skills))
        outcomes += skill.measure(system)
    results = skills.results(outcomes)
    tell("measured", row=row, results=results, cached=False)
    return results


def _level(c: Any) -> dict[str, Any]:
    graded = {"nll": c.nll.after if c.nll else None, "kl": c.kl.after if c.kl else None}
    ci = list(c.after_ci95) if c.after_ci95 else None
    return {
        "name": c.name,
        "role": c.role,
        "metric": c.metric,
        "unit": c.unit,
        "n": c.n,
        "value": c.after,
        "ci95": ci,
        **graded,
    }


def suite(given: Any) -> Any:
    """A suite from a part, `lab`, `evaluate.lab`, `{evaluate.lab: {target: sort}}` as text, or a file of test rows."""
    if isinstance(given, str):
        if given.lstrip().startswith("{"):
            given = schema.parse_yaml(given, "--suite")
        elif f"evaluate.{given}" in parts.index():
            given = f"evaluate.{given}"
        elif given not in parts.index() and Path(given).exists():
            given = {"evaluate.file": {"data": {"data.file": {"path": given, "holdout": 0.0}}, "rows": "all"}}
        elif given not in parts.index():
            known = [n.removeprefix("evaluate.") for n in parts.names("evaluate")]
            if not Path(given).suffix or given.startswith("evaluate."):
                near = nearest(given.removeprefix("evaluate."), known)
                raise UserError("--suite", given, f"neither a suite nor a file; {near}")
            place = Path(given).expanduser().parent
            files = [str(p) for p in place.iterdir() if p.is_file()] if place.is_dir() else []
            near = nearest(given, files)
            suites = f"name a file of test rows, or a suite: {', '.join(known)}"
            raise UserError("--suite", given, f"no such file; {near if near.startswith('did') else suites}")
    return parts.build(given, Suite, "--suite")
