"""Show one method: what it does, its formula, its options.

    temper part adapters.lora
    temper part objectives.preference.dpo --json

The options are what a recipe may give it: {adapters.lora: {rank: 8}}. Options that may be a schedule take one in place of
a number: {optim.adamw: {lr: {schedules.cosine: {peak: 1e-3}}}}.
"""

from __future__ import annotations

from typing import Any

from temperament.cli.app import Opt
from temperament.cli.say import Say

OPTIONS = (Opt("name", "a part as `temper parts` lists it", "NAME"),)


def run(a: Any, say: Say) -> dict[str, Any]:
    from temperament import parts

    card = parts.card(a.name)
    return card.to_json() if a.json else card.to_json() | {"doc": card.doc}


def show(data: dict[str, Any], say: Say, a: Any) -> None:
    import inspect

    from rich.markup import escape
    from rich.text import Text

    head, _, rest = data["doc"].partition("\n")
    say.out.print(f"[bold]{data['name']}[/bold]  {escape(head)}", soft_wrap=True)
    if rest.strip():
        say.out.print(Text("\n" + inspect.cleandoc("\n" + rest)), soft_wrap=True)
    if data["options"]:
        say.out.print()
        rows = [[Text(n, "bold"), default(o["default"]), Text(o["type"], "dim"), o["help"]] for n, o in data["options"].items()]
        say.table(["option", "default", "type", ""], rows)
    facts = {
        "papers": ", ".join(data["papers"]),
        "modalities": ", ".join(m for m in data["modalities"] if m != "any"),
        "declares": ", ".join(data["declares"]),
    }
    if any(facts.values()):
        say.out.print()
    for key, value in facts.items():
        if value:
            say.out.print(Text.assemble((f"{key:<11}", "dim"), value))


def default(value: Any) -> str:
    from temperament.run.new import scalar

    return value if value == "(required)" else scalar(value)
