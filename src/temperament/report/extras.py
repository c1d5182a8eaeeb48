"""The sections about the run itself: what changed in the weights, plan against actual, pictures, facts. No data, None."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from temperament.report import show
from temperament.report.show import is_number


def weights(w: Any, most: int = 2400) -> list[dict[str, Any]] | None:
    """Heat maps of layers by kinds of weight: relative change, effective rank of the change, intruder dimensions."""
    cells = w.get("cells") if isinstance(w, Mapping) else w
    cells = [c for c in cells or [] if isinstance(c, Mapping) and c.get("kind") is not None and c.get("layer") is not None][
        :most
    ]
    if not cells:
        return None
    kinds = list(dict.fromkeys(str(c["kind"]) for c in cells))[:16]
    layers = list(dict.fromkeys(str(c["layer"]) for c in cells))
    maps = []
    for key, title, help_, percent in (
        ("relative", "Relative change", "norm of the change over norm of the weight, %", True),
        ("rank", "Effective rank", "directions the change uses", False),
        ("intruders", "Intruder dimensions", "new top directions unlike any the base had", False),
    ):
        at = {(str(c["layer"]), str(c["kind"])): c[key] for c in cells if is_number(c.get(key))}
        if not at:
            continue
        top = max(at.values()) or 1.0
        rows = []
        for layer in layers:
            row = []
            for kind in kinds:
                v = at.get((layer, kind))
                text = (
                    ""
                    if v is None
                    else f"{100 * v:.2g}"
                    if percent and abs(100 * v) < 10
                    else f"{100 * v:.0f}"
                    if percent
                    else show.digits(round(v, 1))
                )
                row.append(
                    {
                        "text": text,
                        "alpha": "0" if v is None else f"{max(0.0, v / top) * 0.9:.2f}",
                        "hot": v is not None and v / top > 0.9,
                    }
                )
            rows.append({"layer": layer, "cells": row})
        maps.append({"title": title, "help": help_, "kinds": kinds, "rows": rows})
    return maps or None


def plan(run: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Predicted against actual; the actual may come from the run's cost."""
    p = run.get("plan") if isinstance(run.get("plan"), Mapping) else {}
    cost = run.get("cost") if isinstance(run.get("cost"), Mapping) else {}
    get = lambda side, key: (
        p[side].get(key) if isinstance(p.get(side), Mapping) else p[key].get(side) if isinstance(p.get(key), Mapping) else None
    )
    rows = []
    for key, title, form in (
        ("peak_bytes", "Peak memory", show.size),
        ("seconds", "Time", show.duration),
        ("disk_bytes", "Disk", show.size),
    ):
        told = get("predicted", key) if is_number(get("predicted", key)) else p.get(key) if is_number(p.get(key)) else None
        real = get("actual", key) if is_number(get("actual", key)) else cost.get(key) if is_number(cost.get(key)) else None
        if told is None:
            continue
        ratio = real / told if told and real is not None else None
        most = max(v for v in (told, real) if v is not None) or 1
        rows.append(
            {
                "title": title,
                "told": form(told),
                "real": form(real),
                "floor": form(get("floor", key)) if is_number(get("floor", key)) else None,
                "ratio": f"{ratio:.2f}×" if ratio is not None else "",
                "bars": [f"{100 * (v or 0) / most:.1f}" for v in (told, real)],
            }
        )
    return rows or None


def turned(d: Any, budget: int) -> list[dict[str, Any]]:
    """The dial as rows of pictures: one caption from one noise, a picture a strength. Whole rows, until the budget is spent."""
    points = [p for p in (d or {}).get("points") or [] if isinstance(p, Mapping) and is_number(p.get("strength"))]
    best = d.get("best") if isinstance((d or {}).get("best"), Mapping) else {}
    rows: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for p in sorted(points, key=lambda p: p["strength"]):
        shape = show.name(str(p.get("shape") or "merge.linear").removeprefix("merge."))
        is_best = p["strength"] == best.get("strength") and p.get("shape") == best.get("shape")
        for i in p.get("pictures") or []:
            if isinstance(i, Mapping) and (uri := show.picture(i.get("image"))):
                cell = {"strength": show.digits(p["strength"]), "image": uri, "best": is_best}
                rows.setdefault((show.name(i.get("skill")), show.clip(i.get("caption"), 160), shape), []).append(cell)
    many, found = len({shape for *_, shape in rows}) > 1, []
    for (skill, caption, shape), cells in rows.items():
        budget -= sum(len(c["image"]) for c in cells)
        if budget < 0:
            break
        found.append({"skill": skill, "caption": caption, "shape": shape if many else "", "cells": cells})
    return found


def facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A line of facts under the verdict: base, size of the change, cost."""
    delta, cost, base = (run.get(k) if isinstance(run.get(k), Mapping) else {} for k in ("delta", "cost", "base"))
    out = [("base", str(base.get("id") or ""))]
    if is_number(delta.get("parameters")):
        out.append(("trained", f"{show.count(delta['parameters'])} parameters"))
    if is_number(delta.get("bytes")):
        out.append(("change on disk", show.size(delta["bytes"])))
    if is_number(cost.get("seconds")):
        out.append(("took", show.duration(cost["seconds"])))
    if is_number(cost.get("peak_bytes")):
        out.append(("peak memory", show.size(cost["peak_bytes"])))
    if is_number(cost.get("tokens")) and cost["tokens"]:
        out.append(("tokens", show.count(cost["tokens"])))
    if delta.get("digest"):
        out.append(("digest", str(delta["digest"])[:12]))
    return [(k, v) for k, v in out if v]


def steps(found: Any) -> list[list[tuple[str, str]]]:
    return [pairs(s, most=14) for s in found or [] if isinstance(s, Mapping)][:60]


def exceptions(found: Any) -> list[str]:
    return [show.clip(e, 400) for e in found or []][:20]


def pairs(x: Any, depth: int = 0, prefix: str = "", most: int = 80) -> list[tuple[str, str]]:
    """A nested mapping as rows of (dotted name, short value)."""
    out: list[tuple[str, str]] = []
    if isinstance(x, Mapping):
        for k, v in x.items():
            out += (
                pairs(v, depth + 1, f"{prefix}.{k}" if prefix else str(k))
                if isinstance(v, Mapping) and depth < 4
                else [(f"{prefix}.{k}" if prefix else str(k), v)]
            )
    return [(k, show.clip(", ".join(map(str, v)) if isinstance(v, list) else v, 300)) for k, v in out[:most]]
