"""Standalone SVG pictures for a README or a slide: the comparison of methods, the gain and loss of one run, what a search
tried, and a dial.

Each carries its own colours for light and dark, loads nothing, and shows the same drawing as the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from temperament.report import charts, show, svg, views
from temperament.report.html import stylesheet
from temperament.report.svg import el


def compare_picture(compare: Mapping[str, Any], title: str = "Gained against forgotten") -> str | None:
    """The Pareto picture of `run["compare"]`; None when there is nothing to compare."""
    found = charts.compare(show.clean(compare))
    if found is None:
        return None
    chart = Markup(str(found["chart"]).replace("<svg ", '<svg x="10" y="44" width="600" height="428" ', 1))
    return _page([el("text", title, x=24, y=30, class_="title"), chart], 620, 484, title)


def search_picture(search: Mapping[str, Any], title: str = "What the search tried") -> str | None:
    """The trials of a merge's search and their front; None when none was finished."""
    at = lambda row: (row["retained_change"] / 100, row["target_change"] / 100)
    if not search.get("trials"):
        return None
    budget = search.get("budget")
    label = f"{len(search['trials'])} trials, gain against what was kept"
    chart = str(svg.trials([at(r) for r in search["trials"]], at(search["best"]), label, (budget or 0.0) / 100))
    chart = Markup(chart.replace("<svg ", '<svg x="10" y="44" width="600" height="428" ', 1))
    return _page([el("text", title, x=24, y=30, class_="title"), chart], 620, 484, title)


def dial_picture(dial: Mapping[str, Any], title: str = "How much of the change to use") -> str | None:
    """The curves of a dial, what is drawn how, and its answer; None of fewer than two points."""
    found = charts.dial(show.clean(dial))
    if found is None:
        return None
    chart = Markup(str(found["chart"]).replace("<svg ", '<svg x="10" y="44" width="600" height="326" ', 1))
    parts, y = [el("text", title, x=24, y=30, class_="title"), chart], 396
    for k, line in enumerate(found["legend"]):
        at, y = 24 + 290 * (k % 2), 396 + 22 * (k // 2)
        swatch = el("line", x1=at, x2=at + 24, y1=y - 4, y2=y - 4, class_=f"curve {line['style']}")
        parts.append(el("g", swatch, class_="chart"))
        parts.append(el("text", line["name"], x=at + 32, y=y, class_="group"))
    return _page(parts, 620, y + 18, title)


def skills_picture(ledger: Mapping[str, Any], title: str = "What was gained, what was lost") -> str | None:
    """A track per skill, before and after, with its interval; None when nothing was measured."""
    found = views.skills(show.clean(ledger))
    if found is None:
        return None
    parts, y = [el("text", title, x=24, y=30, class_="title")], 50
    for group in found["groups"]:
        parts.append(el("text", group["title"], x=24, y=y + 14, class_="group"))
        y += 24
        for r in group["rows"]:
            parts.append(el("text", show.clip(r["name"], 26), x=24, y=y + 19, class_="name"))
            if r["track"]:
                parts.append(el("svg", r["track"], x=200, y=y, width=330, height=30))
            parts.append(el("text", show.signed(r["change"], r["unit"]), x=590, y=y + 19, class_=f"value {r['seen']}"))
            y += 32
        y += 10
    return _page(parts, 620, y + 10, title)


def write(picture: str, out: Path | str) -> Path:
    out = Path(out)
    out.write_text(picture, encoding="utf-8")
    return out


def _page(parts: list[Markup], width: int, height: int, label: str) -> str:
    style = stylesheet().replace("@media screen {", "@media all {") + (
        ".picture .title { font: 600 17px var(--serif); fill: var(--ink); }"
        ".picture .group { font: 11px var(--sans); fill: var(--soft); }"
        ".picture > .name { font: 600 13px var(--sans); fill: var(--ink); }"
        ".picture .value { font: 600 13px var(--sans); fill: var(--c); text-anchor: end; }"
    )
    frame = el("rect", x=0.5, y=0.5, width=width - 1, height=height - 1, rx=11, fill="var(--card)", stroke="var(--line)")
    return str(
        el(
            "svg",
            el("style", Markup(style)),
            frame,
            *parts,
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {width} {height}",
            width=width,
            height=height,
            role="img",
            aria_label=label,
            class_="picture",
        )
    )
