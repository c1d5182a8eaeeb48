"""Check that training is exact on your model and data.

    temper check recipe.yaml
    temper check recipe.yaml --resume

A few real rows go through the real loop in all the ways that must not matter: split over micro-batches, padded, packed,
streamed; tokens that carry loss, the end of a turn among them, no doubled start. --resume kills a short run of your
recipe and goes on with it: the result must be the same to the bit. Deviations are shown; a law that does not hold ends
with exit code 1 or 2.
"""

from __future__ import annotations

from typing import Any

from temperament.cli.app import Opt
from temperament.cli.say import Say

OPTIONS = (
    Opt("recipe", "a recipe file, or a run folder", "RECIPE"),
    Opt("--resume", "prove that a killed run goes on to the same bits"),
    Opt("--set", "change one entry of the recipe", "KEY=VALUE", many=True),
)


def run(a: Any, say: Say) -> dict[str, Any]:
    from temperament import api

    return api.check(a.recipe, overrides=a.set or (), resume=a.resume)


def show(data: dict[str, Any], say: Say, a: Any) -> None:
    from rich.text import Text

    from temperament.cli.views import flat, mark

    for step in data.get("steps", ()):
        say.out.print(f"[bold]{step['name']}[/bold]")
        say.table(
            ["", "law", "deviation", "allowed", ""],
            [
                [
                    mark(law["ok"]),
                    law["name"],
                    small(law["deviation"]),
                    small(law["tolerance"]),
                    Text(law.get("detail") or "", "dim"),
                ]
                for law in step["laws"]
            ],
            right=(2, 3),
        )
        for why in step.get("exempt", ()):
            say.out.print(Text(f"not promised: {why}", "dim"))
        say.out.print()
    flat(data, say, skip=("steps",))


def small(x: float | None) -> str:
    return "" if x is None else "0" if x == 0 else f"{x:.0e}"
