"""Claims: a paper's main result as a small experiment against its baseline, over several seeds, recorded as it came out.

    claims/012_half.py       declares `claim = Claim(...)`; its `run(seed, lab)` gives the numbers of method and baseline
    claims/results/012.json  what came out, with seeds, interval, time, place

Status is arithmetic, never judgement: the paired difference of `measure` over seeds, with its 95 % t interval, and the
conditions beside it (say, an equal target).

    holds     the interval lies on the claimed side of 0 and every condition is met
    partly    the mean is on the claimed side; the interval or a condition is not
    fails     the mean is on the other side, or no difference
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from temperament.errors import UserError, nearest
from temperament.run.recipe import read
from temperament.run.study import summary
from temperament.run.tune import tune
from temperament.stats import t_interval
from temperament.train.checkpoint import write_atomic

PLACES = (Path(__file__).resolve().parents[1] / "claims", Path(__file__).resolve().parents[3] / "claims")


@dataclass(frozen=True)
class Claim:
    paper: str  # catalogue number, "012"
    title: str  # the paper
    says: str  # its main result, in a sentence
    parts: tuple[str, ...]  # what carries the method
    measure: str  # number that is compared
    better: Literal["lower", "higher"]  # the claimed side
    run: Callable[[int, Lab], dict[str, dict[str, float]]] = field(repr=False)  # {"method": numbers, "baseline": numbers}
    baseline: str = ""  # what it is compared with
    within: tuple[
        tuple[str, float], ...
    ] = ()  # (number, margin): the method may be at most this much worse than the baseline in it
    seeds: tuple[int, ...] = (0, 1, 2)
    note: str = ""  # what a reader of the result must know
    why: str = ""  # what was found to be the reason, where it did not hold


@dataclass
class Lab:
    """What an experiment is given: a folder of its own, and runs of recipes that are kept and taken up again."""

    folder: Path
    tell: Callable[..., None] = lambda event, **data: None

    def tune(self, name: str, recipe: Any, seed: int) -> dict[str, float]:
        """Numbers of one run (see study.summary); finished runs are not run again."""
        built = read(recipe)
        built = replace(built, seed=seed, check=False, evaluation=replace(built.evaluation, dial=None, diagnose=[]))
        return summary(self.run(name, built, seed).json)

    def run(self, name: str, recipe: Any, seed: int):
        """The whole run of a recipe, with this seed."""
        folder = self.folder / f"{name}-{seed}"
        recipe = replace(read(recipe), seed=seed)
        return (
            tune(recipe, folder, fresh=True, tell=self.tell)
            if not (folder / "run.json").exists()
            else tune(recipe, folder, resume=True, tell=self.tell)
        )

    def best(
        self, name: str, recipe: Callable[[float], Any], rates: list[float], seed: int, tuned_on: int = 100
    ) -> dict[str, float]:
        """A method at its own best learning rate: each is tried on a seed of its own, and the one that reached the level with
        the least loss is used. recipe(rate) -> recipe."""
        tried = [(self.tune(f"{name}-rate-{r:g}", recipe(r), tuned_on), r) for r in rates]
        reached = [t for t in tried if t[0]["reached"]]
        best = max(reached, key=lambda t: t[0]["retained"])[1] if reached else max(tried, key=lambda t: t[0]["worth"])[1]
        return self.tune(name, recipe(best), seed) | {"rate": best}


def folder() -> Path:
    return next((p for p in PLACES if p.is_dir()), PLACES[-1])


def files() -> dict[str, Path]:
    return {p.name[:3]: p for p in sorted(folder().glob("[0-9][0-9][0-9]_*.py"))}


def load(paper: str) -> Claim:
    known = files()
    if paper not in known:
        raise UserError(
            "claim", paper, f"no such claim; {nearest(paper, known) if known else 'claims come with a clone of the project'}"
        )
    spec = importlib.util.spec_from_file_location(f"temperament_claim_{paper}", known[paper])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in it look themselves up
    spec.loader.exec_module(module)
    return module.claim


def result(paper: str) -> dict[str, Any] | None:
    path = folder() / "results" / f"{paper}.json"
    return json.loads(path.read_text()) if path.exists() else None


def listed() -> list[dict[str, Any]]:
    """Every claim with what came of it."""
    claims = {p: load(p) for p in files()}
    return [(result(p) or _blank(c)) | {"why": c.why} for p, c in claims.items()]


def _blank(claim: Claim) -> dict[str, Any]:
    return {
        "paper": claim.paper,
        "title": claim.title,
        "says": claim.says,
        "parts": list(claim.parts),
        "status": "not-run",
        "seeds": 0,
        "method": {},
        "baseline": {},
        "seconds": None,
        "note": claim.note,
        "why": claim.why,
    }


def carry_out(
    paper: str, out: str | Path | None = None, tell: Callable[..., None] = lambda event, **data: None, record: bool = True
) -> dict[str, Any]:
    """Run one claim over its seeds; the result is printed by `temper claim`, and recorded beside the claim."""
    claim, began = load(paper), time.perf_counter()
    lab = Lab(Path(out) if out else Path("runs") / "claims" / paper, tell)
    rows = []
    for seed in claim.seeds:
        tell("phase", name=f"claim {paper}", text=f"seed {seed}")
        rows.append({"seed": seed, **claim.run(seed, lab)})
    found = verdict(claim, rows) | {
        "seconds": time.perf_counter() - began,
        "when": datetime.date.today().isoformat(),
        "where": f"{platform.machine()}, CPU",
    }
    if record:
        write_atomic(folder() / "results" / f"{paper}.json", json.dumps(found, indent=1) + "\n")
    return found


def verdict(claim: Claim, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The contract's object, from the numbers of every seed."""
    sign = 1.0 if claim.better == "higher" else -1.0
    gaps = [sign * (r["method"][claim.measure] - r["baseline"][claim.measure]) for r in rows]
    mean, span = t_interval(gaps)
    average = lambda side: {
        k: sum(r[side][k] for r in rows) / len(rows)
        for k in rows[0][side]
        if all(isinstance(r[side].get(k), (int, float)) for r in rows)
    }
    method, baseline = average("method"), average("baseline")
    missed = [
        f"{name}: {method[name]:.3g} against {baseline[name]:.3g}, more than {margin:g} worse"
        for name, margin in claim.within
        if baseline[name] - method[name] > margin
    ]
    if mean <= 1e-12:  # (sums of equal numbers round)
        status = "fails"
    elif missed or span is None or span[0] <= 0:
        status = "partly"
    else:
        status = "holds"
    words = (
        f"{claim.measure}: better by {mean:.3g}"
        + (f" (95 % interval {span[0]:.3g} to {span[1]:.3g})" if span else "")
        + f" over {len(rows)} seeds"
    )
    return _blank(claim) | {
        "status": status,
        "seeds": len(rows),
        "method": method,
        "baseline": {"name": claim.baseline, **baseline},
        "measure": claim.measure,
        "better": claim.better,
        "difference": mean,
        "ci95": span,
        "rows": rows,
        "note": ". ".join(filter(None, [words, *missed, claim.note])),
    }
