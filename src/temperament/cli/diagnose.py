"""Look at what tuning changed in the weights.

    temper diagnose lab/lm runs/first
    temper diagnose Qwen/Qwen2.5-0.5B models/mine --with diagnose.intruder_dimensions --json

TUNED is a run, an adapter, a delta or a model folder, compared with BASE matrix by matrix. The diagnoses are parts of the
room diagnose; several may be given.
"""

from __future__ import annotations

from typing import Any

from temperament.cli.app import Opt
from temperament.cli.say import Say

OPTIONS = (
    Opt("base", "what it was tuned from", "BASE"),
    Opt("tuned", "a run, an adapter, a delta or a model folder", "TUNED"),
    Opt(
        "--with",
        "a part of the room diagnose, with options if need be",
        "PART",
        many=True,
        shown="diagnose.intruder_dimensions",
    ),
)


def run(a: Any, say: Say) -> dict[str, Any]:
    from temperament import api
    from temperament.run.recipe import parse_yaml

    looks = [parse_yaml(w, "--with") if w.lstrip().startswith("{") else w for w in a.with_ or ["diagnose.intruder_dimensions"]]
    return api.diagnose(a.base, a.tuned, looks)


def show(data: dict[str, Any], say: Say, a: Any) -> None:
    from temperament.cli.views import flat
    from temperament.report.show import size

    d = data["delta"]
    say.out.print(f"[dim]change   [/dim] {d['parameters']:,} parameters changed, {size(d['bytes'])}")
    for name, found in data["diagnoses"].items():
        say.out.print(f"\n[bold]{name}[/bold]")
        still = {key: [r for r in rows if unmoved(r)] for key, rows in found.items() if isinstance(rows, list)}
        flat(found | {key: [r for r in found[key] if not unmoved(r)] for key, rows in still.items() if rows}, say)
        for key, rows in still.items():
            if rows:
                say.out.print(f"[dim]{key}: {len(rows)} more that did not change are left out (--json has them)[/dim]")


def unmoved(row: Any) -> bool:
    """A place where nothing was changed: its change is stated, and 0."""
    return isinstance(row, dict) and row.get("relative_norm") == 0
