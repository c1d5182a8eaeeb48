"""List all methods, by room.

    temper parts
    temper parts lora
    temper parts --room adapters
    temper parts --json

A part is one method: a way to choose what is trained, an objective, an optimizer, a merge. Recipes name them as
`room.name`; `temper part NAME` explains one. Packages of others add parts by the entry point `temperament.parts`.
"""

from __future__ import annotations

from typing import Any

from temperament.cli.app import Opt
from temperament.cli.say import Say

OPTIONS = (
    Opt("text", "only parts with this text in their name, summary or papers", "TEXT", shown="all"),
    Opt("--room", "only the parts of one room, such as select or objectives.policy", "ROOM"),
)


def run(a: Any, say: Say) -> list[dict[str, Any]]:
    from temperament import parts
    from temperament.errors import UserError, nearest

    if a.room is not None and not parts.names(a.room):
        rooms = {n.partition(".")[0] for n in parts.index()}
        raise UserError("--room", a.room, f"no such room; {nearest(a.room, rooms)}")
    names, brief = parts.names(a.room), parts.brief()
    if a.text:
        holds = lambda n: a.text.lower() in " ".join([n, *map(str, brief[n].values())]).lower()
        names = [n for n in names if holds(n)]
        if not names:
            raise UserError("text", a.text, f"no part has it; {nearest(a.text, parts.names(a.room))}")
    if a.json:
        return [parts.card(name).to_json() for name in names]
    return [{"name": n, "room": n.partition(".")[0], **brief[n]} for n in names]


def show(data: list[dict[str, Any]], say: Say, a: Any) -> None:
    from rich.text import Text

    left = max(len(d["name"]) for d in data) + 3
    width = say.out.width - left - 2
    room = ""
    for d in data:
        if d["room"] != room:
            room = d["room"]
            say.out.print(f"\n[bold]{room}[/bold]" if d is not data[0] else f"[bold]{room}[/bold]")
        text = d["summary"] if len(d["summary"]) <= width else d["summary"][: width - 1].rsplit(" ", 1)[0].rstrip(".,:;") + " …"
        say.out.print(Text.assemble(f"  {d['name']:<{left}}", (text, "dim")), soft_wrap=True)
