"""Find how much of a finished change to use, without training again.

    temper dial runs/first
    temper dial runs/first --budget 1 --strengths 0,0.2,0.4,0.6,0.8,1
    temper dial runs/first --shape merge.linear,merge.lines --bake models/first

The strength of the change is swept: what do the targets gain, what do the retained skills lose? The best point gains most
among those that lose no more than the budget, in percentage points on average. --bake writes that point as a model.
Points are kept in dial.json as they are measured and drawn in dial.svg: stopped or asked for more, the sweep goes on.
"""

from __future__ import annotations

from typing import Any

from temperament.cli.app import Opt
from temperament.cli.say import Say

OPTIONS = (
    Opt("run", "a finished run", "RUN"),
    Opt("--budget", "percentage points the retained skills may lose on average", "POINTS", float, shown="the recipe's, or 0.5"),
    Opt("--strengths", "strengths tried, separated by commas", "A,B,...", shown="the recipe's, or 0,0.25,0.5,0.75,1"),
    Opt(
        "--shape",
        "how a strength scales the change, separated by commas: merge.linear, merge.lines",
        "A,B,...",
        shown="the recipe's, or merge.linear",
    ),
    Opt("--items", "items a skill", "N", int, shown="the recipe's, or 60"),
    Opt("--out", "folder of dial.json and dial.svg", "DIR", shown="the run's own"),
    Opt("--bake", "write the best point to this new folder", "DIR"),
    Opt(
        "--as",
        "what --bake writes: merged (a model), adapter or delta",
        "FORM",
        default="merged",
        choices=("merged", "adapter", "delta"),
    ),
    Opt("--device", "auto, cpu or cuda", "DEVICE", default="auto"),
    Opt("--quiet", "no progress, only the result"),
)


def run(a: Any, say: Say) -> dict[str, Any]:
    from temperament import api
    from temperament.cli.live import Live
    from temperament.errors import UserError

    try:
        strengths = [float(s) for s in (a.strengths or "").split(",") if s.strip()]
    except ValueError:
        raise UserError("--strengths", a.strengths, "give numbers separated by commas, e.g. 0,0.5,1") from None
    shape = [s.strip() for s in (a.shape or "").split(",") if s.strip()]
    with Live(say) as tell:
        return api.dial(
            a.run,
            budget=a.budget,
            strengths=strengths,
            shape=shape,
            items=a.items,
            bake=a.bake,
            as_=a.as_,
            device=a.device,
            out=a.out,
            tell=tell,
        )


def show(data: dict[str, Any], say: Say, a: Any) -> None:
    from rich.text import Text

    from temperament.cli.views import certified, dial_best, percent, place, signed, within

    rows = []
    for p in data["points"]:
        best, style = p == data["best"], "" if within(p, data["budget"]) else "dim"
        rows.append(
            [
                Text(f"{'●' if best else ' '} {p['strength']:g}", "bold" if best else style),
                Text(p["shape"].removeprefix("merge."), style),
                Text(percent(p["target"]), style),
                Text(signed(p["target_change"]), style),
                Text(percent(p["retained"]), style),
                Text(signed(p["retained_change"]), style),
            ]
        )
    say.table(["strength", "shape", "target", "change", "retained", "change"], rows, right=(2, 3, 4, 5))
    say.out.print()
    dial_best(data, say)
    if data.get("picture"):
        place("picture", data["picture"], say)
    if data.get("baked"):
        certified(data["certificate"], data["baked"], say)
        if data["best"]["strength"] == 0:
            say.note("the best point is at strength 0: what was baked is the base itself; a larger --budget lets it change")
