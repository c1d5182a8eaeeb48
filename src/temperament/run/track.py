"""Trackers: what a run tells of itself, sent on to those that `log_with` names (tensorboard, wandb, mlflow, ... by Accelerate).

STEP/loss  STEP/rate  STEP/norm ...     each optimizer step of the recipe's step STEP, at the number of that update
STEP/skill/NAME                         each look at a skill while training
ledger/SKILL                            each row of the ledger, in order
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

from temperament.parts import plain
from temperament.run.recipe import Recipe
from temperament.train.world import World

Tell = Callable[..., None]


@contextmanager
def tracked(world: World, recipe: Recipe, tell: Tell) -> Iterator[Tell]:
    """`tell`, which also tells the trackers; they are closed however the run ends."""
    if not recipe.log_with:
        yield tell
        return
    world.track(_flat(plain(recipe)))
    rows = 0

    def both(event: str, **data: Any) -> None:
        nonlocal rows
        tell(event, **data)
        if event == "step":
            world.log(_numbers(data, data["name"]), data["step"])
        elif event == "look":
            world.log({f"{data['name']}/skill/{n}": v for n, v in data["skills"].items()}, data["step"])
        elif event == "measured":
            world.log({f"ledger/{n}": r.mean for n, r in data["results"].items() if r.mean is not None}, rows)
            rows += 1

    try:
        yield both
    finally:
        world.accelerator.end_training()


def _numbers(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Every number in nested values, by its path."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}/{name}")
        elif isinstance(value, Real) and not isinstance(value, bool) and name not in ("step", "total"):
            found[f"{prefix}/{name}"] = float(value)
    return found


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """The resolved recipe as trackers take options: one name, one number or text."""
    if not isinstance(values, (dict, list)):
        return {prefix: values if isinstance(values, (int, float, str, bool)) else str(values)}
    items = values.items() if isinstance(values, dict) else enumerate(values)
    return {k: v for name, value in items for k, v in _flat(value, f"{prefix}.{name}" if prefix else str(name)).items()}
