"""What a user may ask for, from Python and from the command line alike: one function a verb.

They put the floors together - a run and its report - and decide nothing themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from temperament.bases.load import Base
from temperament.errors import TemperError, UserError
from temperament.run import recipe as schema
from temperament.run.diagnose import diagnose
from temperament.run.evaluate import evaluate
from temperament.run.generate import chat, generate
from temperament.run.merging import merge
from temperament.run.sample import sample
from temperament.run.tune import Run, base_of
from temperament.run.tune import tune as carry_out
from temperament.train.world import World, speaks

Tell = Callable[..., None]
RecipeLike = str | Path | Mapping[str, Any] | schema.Recipe


def silent(event: str, **data: Any) -> None:
    pass


def tune(
    recipe: RecipeLike,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    fresh: bool = False,
    overrides: Iterable[str] = (),
    base: Base | None = None,
    report: bool = True,
    tell: Tell = silent,
) -> Run:
    """Carry out a recipe in the folder `out` and write its report.html; returns the Run (ledger, delta, model, json)."""
    run = carry_out(recipe, out, resume=resume, fresh=fresh, overrides=overrides, base=base, tell=tell)
    if report and (run.folder / "run.json").exists():
        _drawn(run.folder, tell)
    return run


def _drawn(folder: Path, tell: Tell) -> None:
    """report.html. The work is done by now: a report that cannot be drawn is said and harms nothing."""
    from temperament import report

    if not speaks():
        return
    try:
        tell("report", path=str(report.write(folder)))
    except TemperError:
        raise
    except Exception as problem:
        tell(
            "note",
            text=f"the report could not be drawn ({type(problem).__name__}: {str(problem)[:160]}); everything else is saved",
        )


def plan(recipe: RecipeLike, *, overrides: Iterable[str] = (), base: Base | None = None) -> dict[str, Any]:
    """What the recipe will take: memory, time, disk; from shapes alone first, and where it fits verified with one dry step."""
    from temperament.run import plan as plans

    spec = schema.read(recipe, overrides)
    if base is None:
        rough = plans.plan(spec, plans.shapes(spec), dry=False)
        if not rough["fits"]:
            return rough
    return plans.plan(spec, base or base_of(spec, World(spec.precision.compute, device=spec.device)))


def check(
    recipe: RecipeLike, *, overrides: Iterable[str] = (), base: Base | None = None, resume: bool = False
) -> dict[str, Any]:
    """Exactness on this model and data; with `resume` also that a killed run goes on to the same bits."""
    from temperament.run import check as checks

    spec = schema.read(recipe, overrides)
    if resume:
        return checks.check_resume(spec)
    world = World(spec.precision.compute, device=spec.device)
    return checks.check(spec, base or base_of(spec, world), world)


def dial(
    run: str | Path,
    *,
    budget: float | None = None,
    strengths: Sequence[float] = (),
    shape: Sequence[str] = (),
    items: int | None = None,
    bake: str | Path | None = None,
    as_: str = "merged",
    device: str = "auto",
    out: str | Path | None = None,
    tell: Tell = silent,
) -> dict[str, Any]:
    """Sweep the strength of a finished run's change and answer a budget (percentage points); `bake` writes the best point.
    Points are kept in dial.json and drawn in dial.svg, in `out` or the run's folder: a sweep that was stopped goes on."""
    from dataclasses import replace

    from temperament.report import picture
    from temperament.run.dial import dial as sweep
    from temperament.run.dial import scaled
    from temperament.run.export import export_delta, free
    from temperament.run.reopen import reopen

    if bake is not None:
        free(bake, "--bake")
    again = reopen(run, device)
    given = {"budget": budget, "strengths": list(strengths) or None, "shape": list(shape) or None, "items": items}
    given = {k: v for k, v in given.items() if v is not None}
    try:
        spec = replace(again.recipe.evaluation.dial or schema.Dial(), **given)
    except ValueError as problem:
        name = str(problem).split(" ", 1)[0]
        raise UserError(f"--{name}", given.get(name), str(problem)) from None
    place = Path(run if out is None else out)
    if place.is_file():
        raise UserError("--out", str(place), "this is a file; name a folder")
    found = {"run": str(run), **sweep(again.skills(), again.delta, spec, tell, place / "dial.json")}
    if (drawn := picture.dial_picture(found)) is not None:
        found["picture"] = str(picture.write(drawn, place / "dial.svg"))
    if bake is not None:
        again.base.reset()
        found |= {
            "baked": str(bake),
            "certificate": export_delta(again.base, scaled(again.delta, found["best"], again.base.places), Path(bake), as_),
        }
    return found


def search(models: Sequence[str], out: str | Path, **how: Any) -> dict[str, Any]:
    """`run.merge_search.search`, with its trials in OUT/search.json and their front drawn in OUT/search.svg."""
    from json import dumps

    from temperament.report import picture
    from temperament.run.merge_search import search as carried_out

    done = carried_out(models, out, **how)
    drawn = Path(out) / "search.svg"
    (Path(out) / "search.json").write_text(dumps(done["search"], indent=1), encoding="utf-8")
    picture.write(picture.search_picture(done["search"]), drawn)
    done["search"]["picture"] = str(drawn)
    return done


def export(
    run: str | Path, to: str | Path, as_: str = "merged", *, at: str | float | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """Write a finished run for others to load. at: a strength, or "best" for the best point of the run's dial. dtype: of a
    merged model (fp32, bf16, fp16); default: what the base is stored in."""
    from temperament.run.artefacts import Folder
    from temperament.run.export import export as write

    point: dict[str, Any] | None = None
    if at == "best":
        point = (Folder(Path(run)).run().get("dial") or {}).get("best")
        if point is None:
            raise UserError(
                "--at", "best", "this run has no dial; add evaluation.dial to its recipe, or sweep it with `temper dial`"
            )
    elif at is not None:
        if not math.isfinite(float(at)):
            raise UserError("--at", at, "give a finite number, or best")
        point = {"shape": "merge.linear", "strength": float(at)}
    return {"run": str(run), "to": str(to), "as": as_, "at": point, "certificate": write(run, to, as_, point, dtype)}


def look(
    data: str, base: str | Base, *, n: int = 3, skip_bad: bool = False, limit: int | None = None,
    columns: dict[str, str] | None = None, **options: Any
) -> dict[str, Any]:
    """What a base will really see of a file: tokens, weights, roles, totals. options: those of `engine.encode`;
    columns: ours by the file's names, e.g. {"prompt": "question"}."""
    from temperament.bases.load import load
    from temperament.engine.describe import describe
    from temperament.engine.rows import read_rows
    from temperament.methods.data.folder_images import FolderImages, as_read, holds_images
    from temperament.run.generate import needs_tokenizer

    if n < 0:
        raise UserError("--n", n, "give 0 or more")
    tokenizer = needs_tokenizer(base if isinstance(base, Base) else load(base, field="--base"))
    on_bad = "skip" if skip_bad else "stop"
    if holds_images(str(data)):
        rows = FolderImages(str(data), on_bad, limit).read()
        examples = as_read(rows, tokenizer)
        notes = [*rows.notes, "the images carry the loss; these are their captions as a text encoder of this base reads them"]
    else:
        rows = read_rows(data, on_bad=on_bad, limit=limit, columns=columns)
        examples, notes = list(rows), list(rows.notes)
    told = describe(examples, tokenizer, n, rows.bad, **options)
    return {"data": data, "shape": rows.shape, "columns": list(rows.columns), "notes": notes, **told}


def compare(
    recipe: RecipeLike,
    methods: Sequence[Any] = (),
    *,
    seeds: Sequence[int] = (0,),
    out: str | Path | None = None,
    overrides: Iterable[str] = (),
    tell: Tell = silent,
) -> dict[str, Any]:
    """Train several methods to the same gain (the recipe's `stop`) and compare what each lost; or, none named, carry out the
    recipe's own `study`. Finished runs are kept."""
    from temperament.methods.studies.compare import Compare, arms_of
    from temperament.run.artefacts import address
    from temperament.run.study import carry_out as study

    spec = schema.read(recipe, overrides)
    if not methods and spec.study is None:
        raise UserError(
            "--methods", None, "name what is compared, e.g. select.full,adapters.lora; or give the recipe a `study`"
        )
    planned = Compare(arms_of(list(methods)), list(seeds)) if methods else spec.study
    out = Path(out) if out is not None else Path("runs") / f"compare-{address(spec.plain(), list(methods), list(seeds))[:12]}"
    finding = study(planned, spec, out, tell)
    _drawn(out, tell)
    return {"out": str(out), **finding}


def claim(paper: str | None = None, **how: Any) -> Any:
    """The claims of all papers (none named), or one carried out."""
    from temperament.run import claims

    return claims.listed() if paper is None else claims.carry_out(paper, **how)


__all__ = [
    "chat",
    "check",
    "claim",
    "compare",
    "diagnose",
    "dial",
    "evaluate",
    "export",
    "generate",
    "look",
    "merge",
    "plan",
    "sample",
    "search",
    "tune",
]
