"""What survived of each skill: a merge and all it was made from, measured on the same items, a row each.

ledger(["runs/a", "runs/b"], "models/ab", base="lab/lm", suites=[{"evaluate.lab": {"target": "shift"}}])
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from temperament.run import recipe as schema
from temperament.run.evaluate import measured, suite
from temperament.run.ledger import Ledger
from temperament.run.reopen import subject
from temperament.run.skills import skills_of
from temperament.run.synergy import synergy
from temperament.train.checkpoint import write_atomic


def ledger(
    models: Sequence[str],
    out: str | Path,
    *,
    suites: Sequence[Any],
    base: str | None = None,
    items: int = 60,
    seed: int = 0,
    tell: Callable[..., None] = lambda event, **data: None,
) -> dict[str, Any]:
    """{"ledger", "synergy"}: rows base (where there is one), every model by its name, merge. Also in OUT/ledger.json, with what
    each row is."""
    spec = schema.Evaluation(suites=[suite(s) for s in suites], items=items, keep=False)
    rows: dict[str, Any] = {}
    places = [*([("base", base)] if base else []), *_named(models), ("merge", str(out))]
    for k, (name, place) in enumerate(places):
        tell("phase", name="measure", text=name)
        tell("note", text=f"{name}, {k + 1} of {len(places)}" + ("" if name == place else f": {place}"))
        model = subject(place)
        skills = skills_of(schema.Recipe(base=model.id, seed=seed, evaluation=spec), model)
        rows[name] = measured(skills, None, tell, name)
        model.reset()
    parents = [row for name, row in rows.items() if name not in ("base", "merge")]
    found = {"ledger": Ledger(rows).to_json(), "synergy": synergy(rows["merge"], parents)}
    write_atomic(Path(out) / "ledger.json", json.dumps({"rows": dict(places), "items": items, "seed": seed, **found}, indent=1))
    return found


def _named(models: Sequence[str]) -> list[tuple[str, str]]:
    """Short names where they tell the models apart."""
    short = [Path(m).name for m in models]
    names = short if len({*short, "base", "merge"}) == len(short) + 2 else [str(m) for m in models]
    return list(zip(names, [str(m) for m in models], strict=True))
