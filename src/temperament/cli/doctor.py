"""Look at this machine and say what would stand in the way.

    temper doctor
    temper doctor --json

Versions, devices, memory, disk, folders and settings; for each problem what mends it, and what is not installed of what
some verbs need. Nothing is sent anywhere. Exit code 1 when there is a problem.
"""

from __future__ import annotations

from typing import Any

from temperament.cli.app import Opt
from temperament.cli.say import Say

OPTIONS: tuple[Opt, ...] = ()


def run(a: Any, say: Say) -> dict[str, Any]:
    from temperament.run.doctor import doctor

    return doctor()


def show(data: dict[str, Any], say: Say, a: Any) -> None:
    from rich.text import Text

    from temperament.report.show import size

    line = lambda key, text: say.out.print(Text.assemble((f"{key:<11}", "dim"), text), soft_wrap=True)
    versions = {k: v for k, v in data["versions"].items() if v}
    line("versions", ", ".join(f"{k} {v}" for k, v in versions.items()))
    line(
        "cpu",
        f"{data['cpu']['name']}, {data['cpu']['cores']} cores"
        + (f", torch uses {data['cpu']['threads']}" if data["cpu"]["threads"] else ""),
    )
    line("memory", f"{size(data['memory']['free'])} free of {size(data['memory']['total'])}")
    for d in data["devices"]:
        line(d["device"], f"{d['name']}, {size(d['free'])} free of {size(d['memory'])}" + ("" if d["bf16"] else ", no bf16"))
    if not data["devices"]:
        line("gpu", "none; everything runs on the CPU")
    for f in data["folders"]:
        line("disk", f"{size(f['free'])} free for {f['what']}, {f['folder']}")
    line("lab bases", ", ".join(data["lab"]) or "none")
    for name, value in data["settings"].items():
        line("setting", f"{name}={value}")
    for e in data["extras"]:
        if e["missing"]:
            line("without", f"{', '.join(e['missing'])}: no {e['for']} ({e['mend']})")
    say.out.print()
    for p in data["problems"]:
        say.out.print(Text.assemble(("✗ ", "bold red"), p["what"], (f"\n  {p['mend']}", "dim")), soft_wrap=True)
    if data["ok"]:
        say.out.print(Text.assemble(("✓ ", "bold green"), "nothing stands in the way"))
