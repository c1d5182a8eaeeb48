"""Studies: many runs under one protocol, cached and resumable. A study plans recipes and reads what the runs left.

    OUT/runs/ARM-seed0/...   each a whole run      OUT/run.json, OUT/report.html
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Any

from temperament.errors import Interrupted, UserError
from temperament.run.artefacts import Folder, address
from temperament.run.recipe import Recipe
from temperament.run.skills import skills_of
from temperament.run.tune import base_of, environment, tune
from temperament.train.checkpoint import write_atomic
from temperament.train.world import World


def carry_out(
    study: Any, recipe: Recipe, out: str | Path, tell: Callable[..., None] = lambda event, **data: None
) -> dict[str, Any]:
    """Run what the study plans, each in a folder named by its address; finished runs are taken as they are. Returns the
    finding."""
    out, world = Path(out), World(recipe.precision.compute, device=recipe.device)
    if out.exists() and any(out.iterdir()) and not (out / "runs").is_dir():
        raise UserError("--out", str(out), "the folder holds other files; name a new one")
    recipe = replace(recipe, study=study)
    base, done, left, folders = base_of(recipe, world), {}, {}, {}
    for number, (where, planned) in enumerate(study.plan(recipe, done)):
        name = (
            re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(str(w) for w in where if w is not None))
            + "-"
            + address(planned.plain())[:8]
        )
        tell("arm", name=where[0], where=where, number=number)
        folder = out / "runs" / name
        stored = Folder(folder).run()
        if stored.get("status") == "done":
            left[where], done[where], folders[where] = stored, summary(stored), folder
            continue
        # A study reads the ledger; dial and diagnosis are made once, of what it chose.
        lean = replace(
            planned, evaluation=replace(planned.evaluation, dial=None, diagnose=[]), check=planned.check and not done
        )
        try:
            run = tune(lean, folder, resume=bool(stored), base=base, tell=tell)
        except Interrupted as stopped:
            raise Interrupted(str(stopped).replace("Go on with --resume.", "Give the same line again to go on.")) from None
        left[where], done[where] = run.json, summary(run.json)
        tell("arm-done", where=where, **done[where])
        folders[where] = folder
    finding = study.read(done)
    json = {
        "status": "done",
        "kind": "study",
        "base": {"id": recipe.base, "sha256": dict(base.sha256)},
        "finding": finding,
        "environment": environment(),
    }
    json["runs"] = {
        "/".join(str(w) for w in where if w is not None): {"folder": str(f.relative_to(out)), **done[where]}
        for where, f in folders.items()
    }
    for key, how in (("compare", "compared"), ("frontier", "frontier")):
        if hasattr(study, how):
            json[key] = getattr(study, how)(finding)
    chosen = study.chosen(finding, done) if hasattr(study, "chosen") else None
    if chosen is not None:
        json["ledger"], json["chosen"] = left[chosen]["ledger"], "/".join(str(w) for w in chosen if w is not None)
        if world.main:
            shutil.copyfile(folders[chosen] / "items.json", out / "items.json")
        if recipe.evaluation.dial:
            tell("phase", name="dial", text=f"sweeping the strength of {json['chosen']}")
            json["dial"] = dial_of(recipe, base, folders[chosen], tell)
    if world.main:
        write_atomic(out / "recipe.yaml", recipe.yaml())
        write_atomic(out / "run.json", dumps(json, indent=1, default=str))
    tell("end", json=json)
    return json


def dial_of(recipe: Recipe, base: Any, folder: Path, tell: Callable[..., None]) -> dict[str, Any]:
    """The dial of a finished run, on the skills of the study's recipe."""
    from temperament.bases.load import change
    from temperament.run.dial import dial

    base.reset()
    return dial(skills_of(recipe, base), change(folder / "delta", base), recipe.evaluation.dial, tell)


def summary(run: dict[str, Any]) -> dict[str, Any]:
    """A run in the numbers a study compares: points are percentage points (of nats: hundredths), losses positive when
    something was lost, and `worth` the target with up meaning better: of nats less is."""
    skills = run["ledger"]["skills"]
    sign = lambda row: 1.0 if row.get("higher_is_better", True) else -1.0
    better = lambda rows, key: sum(sign(r) * r[key] for r in rows) / len(rows) if rows else None
    mean = lambda rows, key: sum(r[key] for r in rows) / len(rows) if rows else None
    targets = [s for s in skills if s["role"] == "target" and s["change"] is not None]
    retained = [s for s in skills if s["role"] == "retained" and s["change"] is not None and s["unit"] == "points"]
    near = [s for s in retained if s.get("distance") == "near"]
    graded = [s for s in skills if s["role"] == "retained" and s.get("nll")]
    diverged = [s for s in skills if s["role"] == "retained" and s.get("kl")]
    trained = [s for s in run["steps"] if s["kind"] == "train"]
    points = lambda v: None if v is None else 100 * v
    return {
        "target": mean(targets, "after"),
        "worth": better(targets, "after"),
        "unit": targets[0]["unit"] if targets else "points",
        "target_nll": mean([s["nll"] for s in targets if s.get("nll")], "after"),
        "gain": points(better(targets, "change")),
        "retained": mean(retained, "after"),
        "loss": -points(better(retained, "change")) if retained else None,
        "near_loss": -points(better(near, "change")) if near else None,
        "nll": sum(s["nll"]["change"] for s in graded) / len(graded) if graded else None,
        "kl": sum(s["kl"]["after"] for s in diverged) / len(diverged) if diverged else None,
        "reached": all(s.get("stopped") for s in trained) if trained else True,
        "steps": sum(s.get("steps", 0) for s in trained),
        "seconds": run["cost"]["seconds"],
        "parameters": run.get("delta", {}).get("parameters"),
        "digest": run.get("delta", {}).get("digest"),
        "skills": {
            s["name"]: {"role": s["role"], "distance": s.get("distance"), "before": s["before"], "after": s["after"]}
            for s in skills
        },
    }
