"""Say what a recipe will take: memory, time, disk.

    temper plan recipe.yaml
    temper plan recipe.yaml --set sft.train.batch=64

From the shapes of the base and what is trained, verified with one dry step; nothing is changed or kept. The floor is what
no program could do without. Where the recipe does not fit, the cheapest change that would is named, and the exit code is
1.
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

    found = api.plan(a.recipe, overrides=a.set or ())
    return {"ok": found.get("fits", True), **found}


def show(data: dict[str, Any], say: Say, a: Any) -> None:
    from rich.text import Text

    from temperament.report.show import duration, size

    said, floor = data.get("predicted") or {}, data.get("floor") or {}
    rows = []
    for what, key, shown in (("memory", "peak_bytes", size), ("training", "seconds", duration), ("disk", "disk_bytes", size)):
        if said.get(key) is not None:
            least = f"floor {shown(floor[key])}" if floor.get(key) is not None else ""
            more = f"{size(data['available_bytes'])} are free" if key == "peak_bytes" and data.get("available_bytes") else ""
            if key == "seconds":
                sampled = any(s.get("samples") for s in data.get("steps") or ())
                more = f"measuring skills{' and sampling what it learns from' if sampled else ''} comes on top"
            rows.append([Text(what, "bold"), shown(said[key]), Text(least, "dim"), Text(more, "dim")])
    say.table(["", "needed", "", ""], rows, right=(1,))
    memory = {k: v for k, v in (data.get("memory") or {}).items() if k not in ("total", "floor") and v}
    if memory:
        say.out.print()
        say.table(
            ["memory for", ""],
            [[k.replace("_", " "), size(v)] for k, v in sorted(memory.items(), key=lambda kv: -kv[1])],
            right=(1,),
        )
    steps = data.get("steps") or []
    if len(steps) > 1:
        say.out.print()
        say.table(
            ["step", "memory", "time", "disk"],
            [[s["name"], size(s["memory"]["total"]), duration(s["seconds"]), size(s["disk_bytes"])] for s in steps],
            right=(1, 2, 3),
        )
    for step in data.get("unforeseen") or ():
        words = f"\n{step['name']} is not in these numbers: {step['why']}"
        say.out.print(Text(words, "yellow"), soft_wrap=True)
    if data.get("mend"):
        say.out.print(Text.assemble(("\nIt does not fit here: ", "bold red"), data["mend"]))
