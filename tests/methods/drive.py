"""What tests of methods share: steps of the real loop on a tiny base, recipes on the lab base, a kill and a resume."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from temperament.bases.load import Base
from temperament.errors import Interrupted
from temperament.run.check import check_step
from temperament.run.recipe import Recipe, Step
from temperament.run.training import build_players, quiet_training
from temperament.run.tune import Run, tune
from temperament.train.loop import Player, train
from temperament.train.world import World
from tests.train.rows import base_of, context, spec


def fresh() -> int:
    """A seed no run has had; printed by pytest when an assertion fails."""
    return secrets.randbits(30)


def tiny(name: str = "llama", seed: int | None = None) -> Base:
    return base_of(name, fresh() if seed is None else seed)


def steps(base: Base, n: int = 3, *, look: Any = None, total: int | None = None, ctx: Any = None, **options: Any) -> Player:
    """n steps of the real loop on synthetic rows; look(player, steps done) is called before the first and after each."""
    s, ctx = spec(**{"clip": None, "steps": total or n, **options}), ctx or context(base)
    for component in base.components.values():
        quiet_training(component)
    player = build_players(s, ctx)[0]
    look = look or (lambda player, done: None)
    look(player, 0)
    stream = s.source.open(ctx)
    train([player], stream, total or n, micro=s.micro, after=lambda done: look(player, done) or done == n)
    return player


def recipe(trainable: Any, steps: int = 4, seed: int = 0, **train: Any) -> dict[str, Any]:
    """A run of a few steps on the lab base, hardly measured."""
    return {"base": "lab/lm", "seed": seed, "check": False, "evaluation": few(),
            "steps": [{"name": "sft", "train": step(trainable, steps, **train)}]}  # fmt: skip


def step(trainable: Any, steps: int = 4, rate: float = 1e-3, **train: Any) -> dict[str, Any]:
    source = {"data.lab": {"skills": ["shift"], "rows": 64}}
    optimizer = {"optim.adamw": {"lr": rate}}
    return {"source": source, "trainable": trainable, "steps": steps, "batch": 4, "optimizer": optimizer, **train}


def few() -> dict[str, Any]:
    suite = {"evaluate.lab": {"target": "shift", "retained": ["copy"]}}
    return {"items": 2, "keep": False, "diagnose": [], "suites": [suite]}


def carried_out(recipe: dict[str, Any], out: Path, **how: Any) -> Run:
    return tune(recipe, out, **how)


def killed(recipe: dict[str, Any], out: Path, after: int, step: str = "sft") -> Run:
    """The run interrupted once `after` steps are done, then taken up again."""
    import signal

    def tell(event: str, **data: Any) -> None:
        if event == "step" and data["name"] == step and data["step"] == after:
            signal.raise_signal(signal.SIGINT)

    try:
        tune(recipe, out, tell=tell)
    except Interrupted:
        return tune(recipe, out, resume=True)
    raise AssertionError("the run was not interrupted")


def laws(base: Base, **options: Any) -> None:
    """Every exactness law holds for a step with these options; a UserError names the one that does not."""
    one = Step("one", train=spec(**options))
    found, _ = check_step(one, base, World(), Recipe("tiny", [one]))
    assert found and all(law.ok for law in found), {law.name: (law.deviation, law.detail) for law in found if not law.ok}
