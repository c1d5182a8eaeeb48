"""report.html: one self-contained file that opens offline, light and dark, on a phone and on paper, always under 3 MB.

    render(run, out)        run = the contents of run.json, and whatever of these there is:

    log          [{"step", "loss", "terms": {name: x}, "skills": {name: 0..1}, "stage", any other number}], a line a step
    items        {skill: [{"id", "prompt", "expected", "before", "after", "status": kept|gained|lost|missed}]}; "image", data
                 URI of what was asked, or "image_before" and "image_after", of what each made
    dial         {"points": [{"strength", "target", "retained", "skills": {name: level}}], "best": {...}, "budget": points}
    compare      {"points": [{"method", "seed", "gain", "loss", "seconds", "peak_bytes", "parameters"}], "note"};
                 gain and loss are shares, loss >= 0
    frontier     {"lines": [{"name", "x", "y"}], "x_label", "rows_label", "best": [{"budget", "best", "rows", "target",
                 "ci95"}], "said", "title"}; y shares
    weights      {"cells": [{"layer", "kind", "relative", "rank", "intruders"}]}
    plan         {"predicted": {"peak_bytes", "seconds", "disk_bytes"}, "actual": {...}, "floor": {...}}; actual also in "cost"
    recipe       the resolved YAML as text;   certificate, environment: mappings;   exceptions: list of sentences

A missing part does not appear. Everything in a run is hostile input (completions!): escaped by the template engine, made
visible by `show.clean`, and fenced by a content policy under which only this page's own script, by its hash, may run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from temperament.report import charts, extras, items, show, views

LIMIT = 2_900_000  # bytes of page; the promise is 3 MB
ITEM_BYTES, ITEM_COUNT, DIAL_BYTES = 1_300_000, 900, 450_000


def render(run: Mapping[str, Any], out: Path | str) -> Path:
    """Write the report of one run; `out` is the file. Written whole or not at all."""
    out = Path(out)
    page = html(run)
    part = out.with_name(out.name + ".part")
    part.write_text(page, encoding="utf-8")
    os.replace(part, out)
    return out


def html(run: Mapping[str, Any]) -> str:
    """The page as text, with fewer items, pictures and words of recipe if it would pass the limit."""
    run = show.clean(run if isinstance(run, Mapping) else {})
    for share in (1.0, 0.5, 0.2, 0.05, 0.0):
        page = _page(run, share)
        if len(page.encode()) < LIMIT:
            break
    return page


def read_run(folder: Path | str) -> dict[str, Any]:
    """A run folder's data: run.json, log.jsonl, recipe.yaml, and items, dial, compare, weights .json."""
    folder = Path(folder)
    run = json.loads((folder / "run.json").read_text("utf-8"))
    for name in ("items", "dial", "compare", "weights"):
        if (path := folder / f"{name}.json").exists():
            run.setdefault(name, json.loads(path.read_text("utf-8")))
    if (path := folder / "log.jsonl").exists():
        run.setdefault("log", list(_lines(path)))
    if (path := folder / "recipe.yaml").exists():
        run.setdefault("recipe", path.read_text("utf-8"))
    return run


def _lines(path: Path):
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:  # the last line of a killed run may be half a line
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def _page(run: Mapping[str, Any], share: float) -> str:
    """The page with `share` of the room for items, pictures and recipe. A damaged section is left out and named."""
    ledger, base = (run.get(k) if isinstance(run.get(k), Mapping) else {} for k in ("ledger", "base"))
    damaged: list[str] = []

    def drawn(name: str, build: Callable[..., Any], *data: Any, otherwise: Any = None) -> Any:
        try:
            return build(*data)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError):
            damaged.append(name)
            return otherwise

    def picked(found: Any) -> Any:
        targets = {s["name"] for s in ledger.get("skills") or () if isinstance(s, Mapping) and s.get("role") == "target"}
        return items.pick(found, int(ITEM_BYTES * share), int(ITEM_COUNT * share), targets=targets)

    compared = drawn("compare", charts.compare, run.get("compare"))
    front = drawn("frontier", charts.frontier, run.get("frontier"))
    said = run.get("verdict") or (front or {}).get("said") or ledger.get("verdict") or (compared or {}).get("said")
    style, script = stylesheet() + _asset("style.css"), _asset("report.js")
    sections = {
        "compare": compared,
        "frontier": front,
        "skills": drawn("skills", views.skills, ledger),
        "headline": drawn("headline", views.headline, ledger, otherwise=[]),
        "matrix": drawn("matrix", views.matrix, ledger.get("matrix")),
        "curves": drawn("log", charts.curves, run.get("log")),
        "dial": drawn("dial", charts.dial, run.get("dial")),
        "turned": drawn("dial", extras.turned, run.get("dial"), int(DIAL_BYTES * share), otherwise=[]),
        "items": drawn("items", picked, run.get("items") or {}),
        "weights": drawn("weights", extras.weights, run.get("weights")),
        "plan": drawn("plan", extras.plan, run),
        "steps": drawn("steps", extras.steps, run.get("steps") if share else None),
        "facts": drawn("facts", extras.facts, run, otherwise=[]),
        "certificate": drawn("certificate", extras.pairs, run.get("certificate")),
        "environment": drawn("environment", extras.pairs, run.get("environment")),
        "exceptions": drawn("exceptions", extras.exceptions, run.get("exceptions"), otherwise=[]),
    }
    return _template().render(
        **sections,
        title=show.clip(run.get("name") or base.get("id") or "a run", 80),
        status=show.clip(run.get("status"), 20),
        error=show.clip(run.get("error"), 600),
        verdict=views.sentences(show.clip(said, 3000)),
        recipe=show.clip(run.get("recipe"), int(120_000 * max(share, 0.02))),
        damaged=damaged,
        differences=items.differences,
        show=show,
        style=Markup(style),
        script=Markup(script),
        policy=_policy(script),
    )


def _policy(script: str) -> str:
    """Nothing may be loaded or run but the inline style and the one script with this hash."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rest = "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src 'sha256-{digest}'; {rest}"


def stylesheet() -> str:
    """Colours, light and dark (by the system, or set by the reader), and the classes of the drawings."""
    dark = _asset("dark.css")
    by_system = f"@media (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{\n{dark}}} }}\n"
    return _asset("colours.css") + f"@media screen {{ {by_system}:root[data-theme=dark] {{\n{dark}}} }}\n" + _asset("chart.css")


@cache
def _asset(name: str) -> str:
    return resources.files("temperament.report").joinpath("templates", name).read_text("utf-8")


@cache
def _template():
    environment = Environment(
        loader=FunctionLoader(_asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html")
