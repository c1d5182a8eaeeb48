"""The ledger's sections: headline, verdict, skills, matrix. What has no data is None and does not appear."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from temperament import stats
from temperament.report import show, svg
from temperament.report.show import is_number

NEAR = {"near": 0, "middle": 1, "far": 2}
WORDS = {"gained": "gain seen", "lost": "loss seen", "none": "no change seen"}


def skills(ledger: Mapping[str, Any], most: int = 200) -> dict[str, Any] | None:
    """Tracks by role; targets that show no gain first, then by gain; retained skills near to the target first, then by loss."""
    rows = [skill(s) for s in ledger.get("skills") or [] if isinstance(s, Mapping)]
    rows = [r for r in rows if r["before"] is not None or r["after"] is not None or r["nll"] or r["kl"]]
    if not rows:
        return None
    order = lambda r: (NEAR.get(r["distance"], 3), r["gain"] if r["gain"] is not None else 0)
    missed = lambda r: (r["seen"] == "gained", -(r["gain"] or 0))  # targets that show no gain first
    titles = {"target": "Target", "retained": "Retained: what it knew before", "other": "Also measured"}
    groups = []
    for role, title in titles.items():
        found = sorted((r for r in rows if r["role"] == role), key=order if role != "target" else missed)
        if found:
            metrics = {r["metric"] for r in found}
            one = metrics.pop() if len(metrics) == 1 else ""
            scale = any(r["track"] and not r["ends"] for r in found)
            groups.append(
                {"role": role, "title": title, "rows": found[:most], "left": len(found[most:]), "metric": one, "scale": scale}
            )
    graded = any(r["nll"] or r["kl"] for r in rows)
    return {
        "groups": groups,
        "rows": rows[:most],
        "graded": graded,
    }


def skill(s: Mapping[str, Any]) -> dict[str, Any]:
    """One skill, from as little as the contract's eleven fields."""
    unit = str(s.get("unit") if s.get("unit") is not None else "points")
    up = s.get("higher_is_better", True)
    before, after, change = (_number(s.get(k)) for k in ("before", "after", "change"))
    if change is None and before is not None and after is not None:
        change = after - before
    ci = s.get("ci95") if _pair(s.get("ci95")) else None
    span = ci if up or ci is None else [-ci[1], -ci[0]]
    seen = s.get("seen") or ("none" if span is None or span[0] <= 0 <= span[1] else "gained" if span[0] > 0 else "lost")
    seen = seen if seen in WORDS else "none"
    floor = s.get("floor")
    row = {
        "name": show.name(s.get("name", "?")),
        "role": s.get("role") if s.get("role") in ("target", "retained") else "other",
        "metric": str(s.get("metric") or ""),
        "unit": unit,
        "distance": s.get("distance") if s.get("distance") in tuple(NEAR) else None,
        "before": before,
        "after": after,
        "change": change,
        "gain": change if up or change is None else -change,
        "ci": ci,
        "gain_ci": span,
        "seen": seen,
        "up": up,
        "set": s.get("kind") == "set",
        "floor": str(floor[0]) if isinstance(floor, list) and floor else None,
        "nll": _graded(s.get("nll")),
        "kl": _graded(s.get("kl")),
        "power": _number(s.get("power")),
    }
    row |= {k: s[k] if is_number(s.get(k)) else None for k in ("n", "kept", "gained", "lost")}
    low, high = 0.0, 1.0
    if unit != "points":
        ends = [v for v in (before, after) if v is not None] or [0.0, 1.0]
        if ci and before is not None:
            ends += [before + ci[0], before + ci[1]]
        pad = 0.15 * ((max(ends) - min(ends)) or abs(ends[0]) or 1.0)
        low, high = min(ends) - pad, max(ends) + pad
    label = f"{row['name']}: {show.level(before, unit)} before, {show.level(after, unit)} after"
    if change is not None:
        label += f", change {show.signed(change, unit)} ({show.interval(ci, unit) or 'no interval'}), {WORDS[seen]}"
    row["track"] = svg.track(before, after, ci, low, high, seen, label) if before is not None or after is not None else None
    row["ends"] = (show.level(low, unit), show.level(high, unit)) if unit != "points" else None
    return row


def _number(x: Any) -> float | None:
    return x if is_number(x) else None


def _graded(x: Any) -> Mapping[str, Any] | None:
    return x if isinstance(x, Mapping) and all(is_number(x.get(k)) for k in ("before", "after", "change")) else None


def _pair(x: Any) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, str) and len(x) == 2 and all(map(is_number, x))


def headline(ledger: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers on top: the mean gain on the targets and the mean change of what was retained, each with its interval."""
    rows = [skill(s) for s in ledger.get("skills") or [] if isinstance(s, Mapping)]
    out = []
    for role, title in (("target", "on the target"), ("retained", "on what it knew")):
        found = [r for r in rows if r["role"] == role and r["unit"] == "points" and r["gain"] is not None]
        if not found:
            continue
        value, ci = stats.mover([(r["gain"], tuple(r["gain_ci"] or (r["gain"], r["gain"]))) for r in found])
        known = all(r["gain_ci"] for r in found)
        seen = "none" if not known or ci[0] <= 0 <= ci[1] else "gained" if ci[0] > 0 else "lost"
        note = found[0]["name"] if len(found) == 1 else f"mean of {len(found)} skills"
        worst = min(found, key=lambda r: r["gain"])
        out.append(
            {
                "value": show.signed(value),
                "ci": show.interval(ci) if known else "",
                "seen": seen,
                "title": title,
                "note": note,
                "worst": f"worst: {worst['name']} {show.signed(worst['gain'])}" if len(found) > 1 and worst["gain"] < 0 else "",
            }
        )
    flips = [r for r in rows if all(r[k] is not None for k in ("kept", "gained", "lost"))]
    if flips:
        out.append(
            {
                "flips": {k: sum(r[k] for r in flips) for k in ("kept", "gained", "lost")},
                "items": sum(r["n"] or 0 for r in flips),
            }
        )
    return out


def sentences(verdict: str) -> list[Markup]:
    """The verdict, a sentence each, `names` set as code."""
    parts = split(verdict)
    set_code = lambda p: re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(p.replace(" %", "\xa0%"))))
    return [Markup(set_code(re.sub(r"(?<=[ (])-(?=\d)", show.MINUS, p))) for p in parts]


def split(verdict: str) -> list[str]:
    return re.split(r"(?<=[.!?]) (?=[A-Z])", verdict.strip()) if verdict and verdict.strip() else []


def matrix(m: Any, most: int = 3000) -> dict[str, Any] | None:
    """Skills by steps, each cell coloured by its change from the first row. Only where there are more than two rows."""
    if not isinstance(m, Mapping) or len(m.get("rows") or []) < 3 or not m.get("skills"):
        return None
    names, columns = m["rows"], m["skills"][: max(1, most // len(m["rows"]))]
    units = m.get("units") or ["points"] * len(m["skills"])
    ups = m.get("higher_is_better") or [True] * len(m["skills"])
    first, rows = m["values"][0], []
    for name, values in zip(names, m["values"], strict=False):
        cells = []
        for k, skill_name in enumerate(columns):
            value, start = values[k], first[k]
            gain = None if value is None or start is None else (value - start) * (1 if ups[k] else -1)
            scale = (
                1.0
                if units[k] == "points"
                else max((abs(v[k] - start) for v in m["values"] if v[k] is not None), default=1)
                if gain
                else 1
            )
            strength = min(1.0, abs(gain) / (scale or 1)) if gain else 0.0
            moved = "" if gain is None else f" ({show.signed(gain, units[k])})"
            cells.append(
                {
                    "text": show.level(value, units[k]),
                    "alpha": f"{strength**0.7 * 0.6:.2f}",
                    "seen": "none" if not gain or abs(gain) < 0.005 * (scale or 1) else "gained" if gain > 0 else "lost",
                    "learned": (m.get("learned") or {}).get(skill_name) == name,
                    "title": f"{show.name(skill_name)} after {show.name(name)}: {show.level(value, units[k])}{moved}",
                }
            )
        rows.append({"name": show.name(name), "cells": cells})
    facts = []
    words = {
        "backward_transfer": ("Backward transfer", "what later steps did to targets learned earlier"),
        "forward_transfer": ("Forward transfer", "what earlier steps did for targets not yet learned"),
    }
    for key, (title, help_) in words.items():
        if isinstance(m.get(key), Mapping) and is_number(m[key].get("value")):
            facts.append(
                {"title": title, "value": show.signed(m[key]["value"]), "ci": show.interval(m[key].get("ci95")), "help": help_}
            )
    if is_number(m.get("average")):
        facts.append(
            {"title": "Average", "value": show.level(m["average"]), "ci": "", "help": "mean of the targets at the end"}
        )
    roles = dict(zip(m["skills"], m.get("roles") or [], strict=False))
    return {
        "skills": [{"name": show.name(s), "role": roles.get(s, "")} for s in columns],
        "rows": rows,
        "facts": facts,
        "left": len(m["skills"]) - len(columns),
    }
