"""Make the lab's consistency model: `python -m temperament.bases.train_consistency`, a quarter of an hour on one core.

It starts from lab/unet and learns, by the objective of iCT with a solver (engine/consistency.py), to make in one to four calls
what that model makes in twenty: both points of a pair lie on one path of the base. Its paths are plain ones (guidance 1: they
show what is asked as surely as guided ones, and vary more), so a sample asks the network once a step, without the empty
caption. Pairs of levels are doubled on the way. What ships is the running mean of the weights. A fixed seed."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from temperament.bases import train_diffusion as lab
from temperament.bases.load import Base, load
from temperament.bases.worlds import sprites
from temperament.engine import consistency
from temperament.engine.denoise import Denoiser, Sampler, denoise
from temperament.nn import draws

LCM = {"_class_name": "LCMScheduler"}  # beside the noise of the base it comes from


@dataclass(frozen=True)
class Plan:
    minutes: float = 15.0
    steps: int = 1500
    rows: int = 32
    rate: float = 5e-4
    warmup: int = 50
    mean: float = 0.995  # decay of the running mean
    guidance: float = 1.0  # of the base whose paths are learnt
    first: int = 18  # pairs of levels at the start
    last: int = 36
    spread: float = 2.0
    middle: float = 0.0  # of ln sigma, by which pairs are drawn
    scenes: int = 40_000
    seed: int = 0


def fresh(seed: int) -> Base:
    """Untrained, with the scheduler of a consistency model: for tests."""
    base = lab.fresh("unet", seed)
    base.processors["scheduler"] = base.processors["scheduler"] | LCM
    return base


def start(of: str) -> tuple[Base, Base]:
    """(what is trained, the base whose paths it learns)."""
    one, two = load(of), load(of)
    one.processors = {"tokenizer": two.processors["tokenizer"], "scheduler": two.processors["scheduler"] | LCM}
    return one, two


def as_consistency(of: str, folder: Path) -> Path:
    """A diffusion base's folder again, its weights under the boundary of a consistency function: where training may begin."""
    source = load(of).folder
    shutil.copytree(source, folder, dirs_exist_ok=True)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "LCMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | LCM, indent=2) + "\n")
    return folder


def train(base: Base, teacher: Base, plan: Plan, tell=print) -> None:
    """In place; at the end the modules are the running mean."""
    pixels, captions = lab.pictures(lab.Plan(scenes=plan.scenes, seed=plan.seed))
    student, solver = Denoiser.of(base), Denoiser.of(teacher)
    params = list(base.components["denoiser"].parameters())  # the text encoder stays
    mean = [p.detach().clone() for p in params]
    stepper = torch.optim.AdamW(params, lr=plan.rate, weight_decay=0.0, betas=(0.9, 0.99))
    began = said = time.monotonic()
    c = 0.00054 * math.sqrt(math.prod(student.shape))
    with torch.no_grad():
        nothing = solver.encode([""])
    for step in range(plan.steps):
        share = max(step / plan.steps, (time.monotonic() - began) / (60 * plan.minutes))
        if share >= 1:
            break
        for group in stepper.param_groups:
            group["lr"] = plan.rate * min((step + 1) / plan.warmup, 0.5 + 0.5 * np.cos(np.pi * share))
        count = consistency.doubled(int(share * 1000), 1000, plan.first, plan.last)
        sigmas = consistency.levels(student.process, count)
        chance = consistency.chances(sigmas, plan.middle, plan.spread)
        ids = torch.arange(step * plan.rows, (step + 1) * plan.rows)
        rows = draws.randint(len(pixels), plan.seed, "consistency/rows", 0, ids)
        two = consistency.pair(student, student.latents(pixels[rows]), ids, plan.seed, sigmas, chance)
        with torch.no_grad():
            read = solver.encode([captions[r] for r in rows.tolist()])
            two = consistency.led(solver, two, read, nothing, plan.guidance)
            wanted = student.clean(two.cleaner, two.now, read)
        error = consistency.pseudo_huber(student.clean(two.noisier, two.then, read) - wanted, c)
        loss = (error / two.apart.float()).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        stepper.step()
        stepper.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(mean, params, 1 - min(plan.mean, (step + 1) / (step + 10)))
        if time.monotonic() - said > 120:
            said = time.monotonic()
            live = [p.detach().clone() for p in params]
            lab.swap(params, mean)
            tell(f"step {step} {(said - began) / 60:.1f} min loss {float(loss.detach()):.4f} {found(base, 96)}")
            lab.swap(params, live)
    lab.swap(params, mean)


def found(base: Base, n: int) -> dict[int, dict[str, float]]:
    """By the number of steps: shares that are right, and `away`, the root mean square to the nearest scene (a blur is right,
    too)."""
    asked = [s.caption() for s in sprites.scenes("test", n, 1)]
    away = lambda how: np.mean([a for _, a in sprites.recognise(denoise(base, asked, how).pixels.numpy())])
    hows = {k: Sampler(k, 0.0, 1.0) for k in (1, 2, 4)}
    return {k: lab.right(base, n, sampler=how) | {"away": float(away(how))} for k, how in hows.items()}


def save(base: Base, of: str, folder: Path, got: dict[int, dict[str, float]], plan: Plan) -> None:
    lab.save(base, "unet", folder, {n: v for n, v in got[4].items() if n != "away"}, lab.Plan(seed=plan.seed))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "LatentConsistencyModelPipeline", "scheduler": ["diffusers", "LCMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(base.processors["scheduler"], indent=2) + "\n")
    count = sum(p.numel() for m in base.components.values() for p in m.parameters())
    lines = "\n".join(f"- {k} step{'s' * (k > 1)}: " + ", ".join(
        f"{n} {v:.3f}" if n == "away" else f"{n} {100 * v:.0f} %" for n, v in r.items()) for k, r in got.items())  # fmt: skip
    (folder / "README.md").write_text(
        f"# lab/consistency\n\nA tiny text-to-image consistency model of the sprite world, made for tests and experiments: 16 "
        f"x 16 pixels, {count:,} parameters,\nfp16. Distilled from {of} at guidance {plan.guidance:g} by `python -m "
        f"temperament.bases.train_consistency` with seed {plan.seed}; it\nis sampled with guidance 1. "
        f"Of 400 samples for captions held out of training, these show what was asked (all:\nshape, colour and place at "
        f"once;\naway: root mean square to the nearest scene):\n\n"
        f"{lines}\n\n{lab.JUDGE}\n\nLicence: Apache-2.0.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--of", default="lab/unet", help="the diffusion base it starts from")
    parser.add_argument("--out", type=Path, default=lab.LAB)
    for name in ("minutes", "steps", "rate", "guidance", "first", "last", "middle"):
        parser.add_argument(f"--{name}", type=type(getattr(Plan, name)), default=getattr(Plan, name))
    given = parser.parse_args()
    plan = replace(Plan(), **{k: v for k, v in vars(given).items() if k not in ("of", "out")})
    base, teacher = start(given.of)
    train(base, teacher, plan, lambda line: print(line, flush=True))
    got = found(base, 400)
    print(got, flush=True)
    save(base, given.of, given.out / "consistency", got, plan)


if __name__ == "__main__":
    main()
