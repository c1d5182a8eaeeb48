"""List the papers' claims, or run one.

    temper claim --list
    temper claim 012
    temper claim 012 --json

A claim is a small experiment that shows a paper's main result against its baseline, over several seeds, on a lab base.
The list shows what came of each - holds, partly, fails, or not run - with the difference on the claimed side, its interval and
the number of seeds; below, the reasons that were found where one did not hold.
"""

from __future__ import annotations

from typing import Any

from temperament.cli.app import Opt
from temperament.cli.say import Say

OPTIONS = (
    Opt("id", "a paper's number, as in the list", "ID", shown="the list"),
    Opt("--all", "run every claim that has not been run"),
    Opt("--list", "list all claims and what came of them"),
    Opt("--out", "folder the runs are kept in", "DIR"),
    Opt("--jobs", "seeds that run side by side", "N", type=int, shown="as many as there are cores"),
    Opt("--quiet", "no progress, only the result"),
)


def run(a: Any, say: Say) -> Any:
    from temperament import api
    from temperament.cli.live import Live

    if a.list or (a.id is None and not a.all):
        return api.claim()
    with Live(say) as tell:
        if a.all:
            out = lambda paper: a.out and f"{a.out}/{paper}"
            one = lambda paper: api.claim(paper, out=out(paper), tell=tell, jobs=a.jobs)
            return [one(c["paper"]) if c["status"] == "not-run" else c for c in api.claim()]
        return api.claim(a.id, out=a.out, tell=tell, jobs=a.jobs)


def show(data: Any, say: Say, a: Any) -> None:
    from rich.text import Text

    from temperament.cli.views import flat

    if isinstance(data, dict):
        flat(data, say, skip=("rows", "parts"))
        sides = [(row["seed"], *(row[side][data["measure"]] for side in ("method", "baseline"))) for row in data["rows"]]
        say.table(["seed", f"{data['measure']}, method", "baseline"], [[str(n), f"{a:.4g}", f"{b:.4g}"] for n, a, b in sides])
        return
    signs = {
        "holds": ("✓ holds", "green"),
        "partly": ("~ partly", "yellow"),
        "fails": ("✗ fails", "red"),
        "not-run": ("  not run", "dim"),
    }
    rows = [[c["paper"], Text(*signs.get(c["status"], (c["status"], ""))), _told(c), c["title"]] for c in data]
    say.table(["paper", "", "better by (95 % interval), seeds", "title"], rows)
    for c in data:
        if c["why"] and c["status"] != "holds":
            say.out.print(f"{c['paper']}  {c['why']}")
    if not data:
        say.out.print("No claims are installed.")


def _told(c: dict[str, Any]) -> str:
    if not c["seeds"]:
        return ""
    span = f" ({c['ci95'][0]:.3g} to {c['ci95'][1]:.3g})" if c["ci95"] else ""
    return f"{c['measure']} {c['difference']:+.2g}{span}, {c['seeds']}"
