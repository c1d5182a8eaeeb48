"""Train several methods to the same gain and compare what each one lost; or carry out a study.

    temper compare recipe.yaml --methods select.full,select.half,adapters.lora
    temper compare recipe.yaml --methods select.full,adapters.lora --seeds 0,1,2 --out runs/compare
    temper compare recipes/budget.yaml

Every method runs the recipe with its own learning rate and stops at the same level of the target: give the recipe's train
step a `stop`, e.g. stop: {skill: target, reach: 0.9}, or --reach. Finished runs are not run again, so methods and seeds
can be added later.
"""

from __future__ import annotations

from typing import Any

from temperament.cli.app import Opt
from temperament.cli.say import Say

OPTIONS = (
    Opt("recipe", "a recipe with one or more train steps", "RECIPE"),
    Opt(
        "--methods",
        "what is trained, separated by commas: parts of the rooms select and adapters",
        "A,B,...",
        shown="the recipe's study",
    ),
    Opt("--seeds", "seeds, separated by commas", "0,1,...", default="0"),
    Opt("--reach", "stop every method once the target is at least this (0 to 1)", "LEVEL", float, shown="the recipe's stop"),
    Opt("--out", "folder of all runs and the finding", "DIR", shown="runs/compare- and the recipe's address"),
    Opt("--set", "change one entry of the recipe", "KEY=VALUE", many=True),
    Opt("--quiet", "no progress, only the result"),
)


def run(a: Any, say: Say) -> dict[str, Any]:
    from temperament import api
    from temperament.cli.live import Live
    from temperament.errors import UserError
    from temperament.run import recipe as schema

    methods = [m.strip() for m in (a.methods or "").split(",") if m.strip()]
    try:
        seeds = [int(s) for s in a.seeds.split(",") if s.strip()]
    except ValueError:
        raise UserError("--seeds", a.seeds, "give whole numbers separated by commas") from None
    if a.reach is not None and not 0 < a.reach <= 1:
        raise UserError("--reach", a.reach, "a level lies between 0 and 1, e.g. 0.9")
    overrides = list(a.set or ())
    if a.reach is not None:
        steps = schema.read(a.recipe, overrides).steps
        overrides += [f"steps.{i}.train.stop.reach={a.reach}" for i, s in enumerate(steps) if s.train]
    with Live(say) as tell:
        return api.compare(a.recipe, methods, seeds=seeds, out=a.out, overrides=overrides, tell=tell)


def show(data: dict[str, Any], say: Say, a: Any) -> None:
    from rich.text import Text

    from temperament.cli.views import percent, place, signed
    from temperament.report.show import duration, level

    say.out.print()
    if "arms" not in data["finding"]:
        return frontier(data, say)
    rows, arms = [], data["finding"]["arms"]
    for arm in arms:
        mark = "●" if arm["front"] else " "
        reached = "" if arm["reached"] else "did not reach the level"
        loss = signed(-arm["loss"]) if arm["loss"] is not None else "–"
        rows.append(
            [
                Text(f"{mark} {arm['name']}", "bold" if arm["front"] else ""),
                level(arm["target"], arm["unit"]),
                bars(arm),
                signed(arm["gain"]) if arm["unit"] == "points" else f"{(arm['gain'] or 0) / 100:+.3f}".replace("-", "−"),
                loss,
                f"{arm['steps']:.0f}",
                duration(arm["seconds"]),
                Text(reached, "yellow"),
            ]
        )
    say.table(["method", "target", "lost ◀  ▶ gained", "gain", "retained", "steps", "time", ""], rows, right=(1, 3, 4, 5, 6))
    seeds = len(data["finding"]["seeds"])
    other = next((f", the gain in {a['unit']}" for a in arms if a["unit"] not in ("points", "")), "")
    say.out.print(
        f"[dim]● nothing else gains as much and loses less. Changes in percentage points{other}, "
        f"{f'mean of {seeds} seeds' if seeds > 1 else 'one seed'}.[/dim]\n"
    )
    if dial := data.get("dial"):
        best = dial["best"]
        shape = "" if best["shape"] == "merge.linear" else f" shaped by {best['shape']}"
        say.out.print(
            f"The dial of {data['chosen']}: to lose at most {dial['budget']:g} points, "
            f"use strength {best['strength']:g}{shape}: "
            f"target {percent(best['target'])}, retained {signed(best['retained_change'])} points"
            f"{' (the base itself)' if best['strength'] == 0 else ''}.\n",
            highlight=False,
        )
    place("runs", data["out"], say)
    place("report", f"{data['out']}/report.html", say)


def frontier(data: dict[str, Any], say: Say) -> None:
    """A study that draws a frontier: its best points, and its advice."""
    from temperament.cli.views import place
    from temperament.report.show import level

    found = data.get("frontier") or {}
    rows = [[r["budget"], r["best"], r["rows"], level(r["target"], r.get("unit", "points"))] for r in found.get("best", ())]
    say.table(["budget", "best share", found.get("rows_label", "rows"), "target"], rows, right=(0, 1, 2, 3))
    say.out.print(f"{found.get('said', '')}\n", highlight=False)
    place("runs", data["out"], say)
    place("report", f"{data['out']}/report.html", say)


def bars(arm: dict[str, Any], width: int = 12) -> Any:
    """Loss to the left, gain to the right, a cell for 100 / width points."""
    from rich.text import Text

    cells = lambda points: min(round(abs(points or 0.0) / 100 * width), width)
    lost, gained = cells(max(arm["loss"] or 0.0, 0.0)), cells(max(arm["gain"] or 0.0, 0.0))
    return Text.assemble(" " * (width - lost), ("▓" * lost, "red"), "│", ("█" * gained, "green"), " " * (width - gained))
