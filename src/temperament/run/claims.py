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
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout

from temperament.errors import UserError, nearest
from temperament.run.recipe import read
from temperament.run.study import summary
from temperament.run.tune import tune
from temperament.stats import t_interval
from temperament.train.checkpoint import write_atomic

TUNED_ON = 100  # seed on which rates are chosen
WIDER = 3  # rates at most that a grid grows by
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


Worth = Callable[[dict[str, float]], Any]  # of the numbers of a run: the greater the better


def least_loss(numbers: dict[str, float]) -> tuple:
    """Of runs that reached their level the one with the least loss, else the one with the best target."""
    return (True, numbers["retained"]) if numbers["reached"] else (False, numbers["worth"])


@dataclass
class Lab:
    """What an experiment is given: a folder of its own, and runs of recipes that are kept and taken up again."""

    folder: Path
    tell: Callable[..., None] = lambda event, **data: None
    took: dict[str, float] = field(default_factory=dict)  # seconds of every run that was used, also of those found done

    def tune(self, name: str, recipe: Any, seed: int) -> dict[str, float]:
        """Numbers of one run (see study.summary); finished runs are not run again."""
        built = read(recipe)
        built = replace(built, seed=seed, check=False, evaluation=replace(built.evaluation, dial=None, diagnose=[]))
        return summary(self.run(name, built, seed).json)

    def run(self, name: str, recipe: Any, seed: int):
        """The whole run of a recipe, with this seed."""
        folder = self.folder / f"{name}-{seed}"
        recipe = replace(read(recipe), seed=seed)
        known = (folder / "run.json").exists()
        done = tune(recipe, folder, fresh=not known, resume=known, tell=self.tell)
        self.took[folder.name] = done.json["cost"]["seconds"]
        return done

    def made(self, name: str, make: Callable[[Path], Any]) -> str:
        """A file or folder that runs read, made once by make(path): seeds that run side by side share it."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                unfinished = path.with_name(path.name + ".unfinished")
                make(unfinished)
                unfinished.rename(path)
        return str(path)

    def best(
        self, name: str, recipe: Callable[[float], Any], rates: Iterable[float], seed: int, worth: Worth = least_loss
    ) -> dict[str, float]:
        """A method at its own best learning rate."""
        rate = self.rate(name, recipe, rates, worth)
        return self.tune(name, recipe(rate), seed) | {"rate": rate}

    def rate(self, name: str, recipe: Callable[[float], Any], rates: Iterable[float], worth: Worth = least_loss) -> float:
        """The best learning rate of recipe(rate) on a seed of its own. Where it is the least or the greatest of those tried,
        and better than its neighbour, one beyond it is tried too: no method is held back by its grid."""
        tried = lambda rates: {r: worth(n) for r, n in self.tried(lambda r: f"{name}-rate-{r:g}", recipe, rates).items()}
        known = tried(rates)
        for _ in range(WIDER):
            beyond = outward(known)
            if beyond is None:
                break
            known |= tried([beyond])
        return best_of(known)

    def tried(
        self, name: Callable[[Any], str], recipe: Callable[[Any], Any], ways: Iterable[Any]
    ) -> dict[Any, dict[str, float]]:
        """Numbers of every way on the seed that choices are made on. Seeds that run side by side share these runs: one that
        another holds is left for later."""
        found, waiting = {}, deque(ways)
        self.folder.mkdir(parents=True, exist_ok=True)
        while waiting:
            way = waiting.popleft()
            try:
                with FileLock(self.folder / f"{name(way)}.lock", timeout=0):
                    found[way] = self.tune(name(way), recipe(way), TUNED_ON)
            except Timeout:
                waiting.append(way)
                time.sleep(0.5)
        return found


def best_of(worth: dict[float, Any]) -> float:
    return max(sorted(worth), key=worth.__getitem__)


def outward(worth: dict[float, Any]) -> float | None:
    """The next rate beyond the best of these, as far from it as its neighbour; None where the best has a neighbour on either
    side, or is no better than its only one."""
    rates, best = sorted(worth), best_of(worth)
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    beside = rates[1] if best == rates[0] else rates[-2]
    return float(f"{best * best / beside:.2g}") if worth[best] > worth[beside] else None


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
    paper: str,
    out: str | Path | None = None,
    tell: Callable[..., None] = lambda event, **data: None,
    record: bool = True,
    jobs: int | None = None,
) -> dict[str, Any]:
    """Run one claim over its seeds, `jobs` of them side by side (default: as many as there are cores); the result is printed
    by `temper claim`, and recorded beside the claim."""
    claim, began = load(paper), time.perf_counter()
    jobs = min(jobs or os.cpu_count() or 1, len(claim.seeds))
    where = Path(out) if out else Path("runs") / "claims" / paper
    if jobs < 2:
        done = [_row(paper, seed, where, tell) for seed in claim.seeds]
    else:
        done = _side_by_side(claim, where, tell, jobs)
    rows, took = zip(*done, strict=True)
    spent = sum({name: seconds for each in took for name, seconds in each.items()}.values())
    found = verdict(claim, list(rows)) | {
        "seconds": max(time.perf_counter() - began, spent / jobs),  # runs that were found done count with what they took
        "jobs": jobs,
        "when": datetime.date.today().isoformat(),
        "where": f"{platform.machine()}, CPU",
    }
    if record:
        write_atomic(folder() / "results" / f"{paper}.json", json.dumps(found, indent=1) + "\n")
    return found


Row = tuple[dict[str, Any], dict[str, float]]  # numbers of a seed; seconds of the runs they are made of


def _row(paper: str, seed: int, where: Path, tell: Callable[..., None] = lambda event, **data: None) -> Row:
    tell("phase", name=f"claim {paper}", text=f"seed {seed}")
    lab = Lab(where, tell)
    return {"seed": seed, **load(paper).run(seed, lab)}, lab.took


def _beside(cores: int) -> None:
    """A process of its own: its share of the cores, and no longer there than who began it. (Runs survive being killed.)"""
    torch.set_num_threads(cores)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _side_by_side(claim: Claim, where: Path, tell: Callable[..., None], jobs: int) -> list[Row]:
    cores = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _beside, (cores,))
    try:
        rows = {pool.submit(_row, claim.paper, seed, where): seed for seed in claim.seeds}
        tell("note", text=f"claim {claim.paper}: {len(rows)} seeds, {jobs} side by side, in {where}")
        for done in as_completed(rows):
            done.result()
            tell("note", text=f"seed {rows[done]} is done")
        return [done.result() for done in rows]
    finally:
        pool.shutdown(cancel_futures=True)


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
