"""Train the lab's policy: `python -m temperament.bases.train_policy`, half a minute on one core.

Behaviour cloning of plans: from what is seen at a step, the next `horizon` actions of a demonstrator, by their mean square.
The demonstrator sees the goal of `insert` with an error and its hand trembles, and the plans are carried out blindly,
against a world that slips: so the policy does `insert` some of the time, and what needs less care nearly always. A fixed
seed; the folder under `lab/` is written with its card.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from temperament.bases.worlds import control
from temperament.engine.episodes import play
from temperament.nn import draws
from temperament.nn.policy import Policy, PolicyConfig

LAB = Path(__file__).parent / "lab"


@dataclass(frozen=True)
class Plan:
    """How the policy is made. aim: spread of the error with which the demonstrator sees the slot; shake: of its hand."""

    episodes: int = 400  # demonstrations of each task
    steps: int = 1500
    rows: int = 512
    rate: float = 2e-3
    aim: float = 0.06
    shake: float = 0.3
    seed: int = 0
    config: PolicyConfig = field(default_factory=lambda: PolicyConfig("peg", control.Peg.observations, control.Peg.actions))


def demonstrations(task: str, plan: Plan) -> tuple[Tensor, Tensor]:
    """(what was seen (rows, observations), the plan from there (rows, horizon * actions)) of every step demonstrated."""
    who, config = torch.arange(plan.episodes), plan.config
    seen, done, weight = control.demonstrated(config.world, task, who, plan.seed, config.horizon, plan.aim, plan.shake)
    return seen[weight > 0], done[weight > 0]


def train(plan: Plan) -> Policy:
    torch.manual_seed(plan.seed)
    model = Policy(plan.config)
    sets = [demonstrations(task, plan) for task in control.tasks(plan.config.world)]
    seen, actions = (torch.cat(x) for x in zip(*sets, strict=True))
    stepper = torch.optim.AdamW([p for n, p in model.named_parameters() if n != "log_std"], lr=plan.rate, weight_decay=1e-4)
    for step in range(plan.steps):
        for group in stepper.param_groups:
            group["lr"] = plan.rate * min((step + 1) / 50, 1 - step / plan.steps)
        rows = draws.randint(len(seen), plan.seed, "policy/rows", step, torch.arange(plan.rows))
        loss = (model(seen[rows]).mean - actions[rows]).square().mean()
        loss.backward()
        stepper.step()
        stepper.zero_grad(set_to_none=True)
    return model.eval()


def measured(model: Policy, n: int = 1000, seed: int = 0) -> dict[str, float]:
    """Share of held-out episodes that succeed, by task."""
    world = lambda task: control.make(model.config.world, task, torch.arange(n), seed, "test")
    return {task: float(play(model, world(task)).success.mean()) for task in control.tasks(model.config.world)}


CARD = """# policy

A lab policy of temperament: {parameters:,} parameters (a perceptron of {layers} layers of {width} units), which plans {horizon}
actions at a time and carries them out blindly. It holds a peg over a table, in the two-dimensional world `peg`
(`bases/worlds/control.py`).
Apache-2.0; trained on demonstrations made by a program. Only for experiments.

## Training
Behaviour cloning of {episodes} noisy demonstrations of each task (the demonstrator misses the slot by a spread of {aim}, its
hand trembles by {shake}), {steps:,} steps of {rows} rows, AdamW, seed {seed}, {seconds:.0f} s on a CPU core; rebuilt by
`python -m temperament.bases.train_policy`.

## What it can do
Share of {n} held-out episodes that succeed, acting on the mean.

| task | what is asked | succeeds |
|---|---|---|
{table}

## What it cannot do
- Look while it acts: within a plan it does not see where the world's slips have brought it, which is why the narrow slot is a
  matter of luck.
- Anything outside of this world, or a slot of another width than the two it was shown.
"""
ASKED = {
    "insert": "down a slot 0.06 wide",
    "wide": "down a slot 0.24 wide",
    "reach": "a point in the air",
    "lift": "out of the slot",
    "rest": "on the table at a mark",
}


def install(model: Policy, plan: Plan, seconds: float, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    found, n = measured(model), 1000
    (folder / "measured.json").write_text(json.dumps(found, indent=1) + "\n")
    table = "\n".join(f"| {t} | {ASKED[t]} | {100 * v:.1f} % |" for t, v in found.items())
    config = {k: getattr(plan.config, k) for k in ("layers", "width", "horizon")}
    numbers = {k: getattr(plan, k) for k in ("episodes", "steps", "rows", "aim", "shake", "seed")}
    size = sum(p.numel() for p in model.parameters())
    card = CARD.format(parameters=size, seconds=seconds, table=table, n=n, **config, **numbers)
    (folder / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=LAB / "policy")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    args = parser.parse_args()
    plan, began = replace(Plan(), steps=args.steps), time.perf_counter()
    model = train(plan)
    install(model, plan, time.perf_counter() - began, args.to)


if __name__ == "__main__":
    main()
