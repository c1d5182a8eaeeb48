"""Proof on the user's own recipe that a run can be killed anywhere: a short version of it, undisturbed, and killed by SIGKILL
at a random moment of its training and resumed; the digests must be equal to the bit.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from temperament.errors import UserError, WorkFailed
from temperament.run.recipe import Evaluation, Recipe, Save, Step

STEPS = 12  # of each train step in the short version

WORK = """
import sys
from temperament.run.tune import tune
def tell(event, **data):
    if event == "step":
        print("step", flush=True)
run = tune(sys.argv[1], sys.argv[2], resume=len(sys.argv) > 3, tell=tell)
print("digest", run.delta.digest if run.delta is not None else "none", flush=True)
"""


def check_resume(recipe: Recipe, kills: int = 1, seed: int | None = None) -> dict[str, Any]:
    """{"ok", "digest", "resumed", "kills": [{"after_steps", "kept"}], "seconds"}. Raises WorkFailed when the digests differ."""
    if recipe.base == "python":
        raise UserError(
            "base", recipe.base, "a model made in Python cannot be made again in a fresh process; save it and name its folder"
        )
    brief, rng, began = short(recipe), random.Random(seed), time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "recipe.yaml"
        path.write_text(brief.yaml(), encoding="utf-8")
        whole, steps, length = _go(path, Path(place) / "whole")
        killed = []
        for _ in range(kills):
            after, moment = rng.randrange(max(steps, 1)), rng.random() * length / max(steps, 1)
            ended, _, _ = _go(path, Path(place) / "killed", resume=bool(killed), kill=(after, moment))
            kept = sorted((p.name for p in Path(place, "killed").glob("checkpoints/*/step-*")), key=lambda n: (len(n), n))
            killed.append({"after_steps": after, "kept": kept[-1] if kept else None})
            if ended:
                break
        resumed = ended or _go(path, Path(place) / "killed", resume=True)[0]
    if resumed != whole:
        raise WorkFailed(
            f"The run killed after {killed[-1]['after_steps']} steps went on to the digest {resumed[:12]}, the undisturbed "
            f"one to {whole[:12]}: a part keeps state outside its state_dict; name it with `temper parts` and report it."
        )
    return {"ok": True, "digest": whole, "resumed": resumed, "kills": killed, "seconds": time.perf_counter() - began}


def short(recipe: Recipe) -> Recipe:
    """The recipe with few steps and nothing measured: what resuming has to survive is training."""

    def brief(step: Step) -> Step:
        step = replace(step, ledger=False, when=None)
        if step.train:
            steps = min(step.train.steps or STEPS, STEPS)
            step = replace(
                step,
                train=replace(step.train, steps=steps, epochs=None, stop=None, keep="live", save=Save(seconds=1e9, steps=3)),
            )
        if step.rounds:
            inner = [brief(s) for s in step.rounds.steps]
            step = replace(step, rounds=replace(step.rounds, times=min(step.rounds.times, 2), until=None, steps=inner))
        return step

    evaluation = Evaluation(keep=False, base=False, items=1, dial=None, diagnose=[])
    return replace(recipe, steps=[brief(s) for s in recipe.steps], evaluation=evaluation, check=False, log_with=None)


def _go(recipe: Path, out: Path, resume: bool = False, kill: tuple[int, float] | None = None) -> tuple[str, int, float]:
    """(digest, or "" if it was killed; steps seen; seconds of training) of one process. kill: steps to let pass, then
    seconds."""
    again = ["resume"] if resume and (out / "run.json").exists() else []
    command = [sys.executable, "-c", WORK, str(recipe), str(out), *again]
    digest, steps, first = "", 0, None
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        for line in process.stdout:
            word, _, rest = line.strip().partition(" ")
            first = first or time.perf_counter()
            steps += word == "step"
            digest = rest if word == "digest" else digest
            if kill and word == "step" and steps > kill[0]:
                time.sleep(kill[1])
                process.kill()
                kill = None
        length = time.perf_counter() - (first or time.perf_counter())
        process.wait()
        if process.returncode > 0:
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise WorkFailed(f"The short run failed: {last[0] if last else process.returncode}")
    return digest, steps, length
