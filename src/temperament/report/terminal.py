"""The same ledger for the terminal: a table and the verdict, as rich renderables (nothing is printed here).

A narrow terminal gets fewer columns, never a broken table; names and texts are data, not markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from temperament.report import show, views

SIGNS = {"gained": "▲", "lost": "▼", "none": "·"}
STYLES = {"gained": "bold blue", "lost": "bold dark_orange3", "none": "dim"}
ROLES = {"target": "target", "retained": "retained", "other": "also"}


def ledger(data: Mapping[str, Any], width: int = 100) -> RenderableType:
    """Table and verdict of a run.json's `ledger`. Below 76 columns the flips go, below 54 the interval, below 40 the levels."""
    data = show.clean(data)
    found = views.skills(data)
    said = [Text(line) for line in views.split(data.get("verdict") or "")]
    if found is None:
        return Group(*said) if said else Text("Nothing was measured.")
    return Group(table(found, width), *(Padding(t, (0, 1)) for t in said))


def table(found: Mapping[str, Any], width: int) -> Table:
    out = Table(box=None, pad_edge=True, padding=(0, 1), header_style="dim", expand=False)
    flips, interval, levels = width >= 76, width >= 54, width >= 40
    out.add_column("skill", overflow="fold", min_width=6)
    for name, there in (
        ("before", levels),
        ("after", levels),
        ("change", True),
        ("95 %", interval),
        ("kept", flips),
        ("gained", flips),
        ("lost", flips),
    ):
        if there:
            out.add_column(name, justify="right", no_wrap=True)
    if found["graded"] and width >= 92:
        out.add_column("NLL", justify="right", no_wrap=True)
    for group in found["groups"]:
        out.add_row(Text(ROLES[group["role"]], "dim italic"))
        for r in group["rows"]:
            name = Text(f"  {r['name']}")
            if r["distance"] and group["role"] != "target" and width >= 66:
                name.append(f" {r['distance']}", "dim")
            cells = [name]
            if levels:
                cells += [Text(show.level(r["before"], r["unit"])), Text(show.level(r["after"], r["unit"]))]
            cells.append(Text(f"{show.signed(r['change'], r['unit'])} {SIGNS[r['seen']]}", STYLES[r["seen"]]))
            if interval:
                cells.append(Text(show.interval(r["ci"], r["unit"]), "dim"))
            if flips:
                cells += [Text("–" if r[k] is None else f"{r[k]:,}") for k in ("kept", "gained", "lost")]
            if found["graded"] and width >= 92:
                cells.append(Text(show.decimals(r["nll"]["change"]) if r["nll"] else "–", "dim"))
            out.add_row(*cells)
    return out
