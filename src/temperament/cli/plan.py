"""Say what a recipe will take: memory, time, disk.

    temper plan recipe.yaml
    temper plan recipe.yaml --set sft.train.batch=64

From the shapes of the base and what is trained, verified with one dry step; nothing is changed or kept. Where it does not fit, the
cheapest change that would is named.
"""

from __future__ import annotations

from typing import Any

from temperament.cli.app import Opt
from temperament.cli.say import Say

OPTIONS = (
    Opt("recipe", "a recipe file, or a run folder", "RECIPE"),
    Opt("--set", "change one entry of the recipe", "KEY=VALUE", many=True),
)


def run(a: Any, say: Say) -> dict[str, Any]:
    from temperament import api

    return api.plan(a.recipe, overrides=a.set or ())


def show(data: dict[str, Any], say: Say, a: Any) -> None:
    from temperament.cli.views import flat

    flat(data, say)
