"""The sections that draw: curves while training, the dial, the comparison of methods. Same rule: no data, None."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from temperament.report import show, svg
from temperament.report.show import is_number
from temperament.report.svg import Series

AXES = ("step", "stage", "skills", "terms", "seconds", "epoch", "time", "event", "tokens", "examples", "rows")
FIRST = ("reward", "kl", "accuracy", "margin", "entropy", "lr", "grad_norm", "tokens_per_second", "tokens/s")
NAMES = {"lr": "learning rate", "kl": "KL", "grad_norm": "gradient norm"}
ROUGH = 40  # a rough curve with more points than this is shown with a running mean on top


def curves(log: Any, most: int = 14) -> dict[str, Any] | None:
    """Small multiples: the loss with its terms, the skills measured on the way, then a plane for each other number."""
    rows = [r for r in log or [] if isinstance(r, Mapping)]
    if len(rows) < 2:
        return None
    steps = [r["step"] if is_number(r.get("step")) else i for i, r in enumerate(rows)]
    if any(b < a for a, b in pairwise(steps)):  # each stage counts from zero: lay them end to end
        steps = list(range(len(rows)))
    stages, last = [], None
    for at, r in zip(steps, rows, strict=True):
        if r.get("stage") is not None and r["stage"] != last:
            last = r["stage"]
            stages.append((at, str(last)[:18]))
    stages = stages if len(stages) > 1 else []
    nested: dict[str, dict[str, tuple[list, list]]] = {"terms": {}, "skills": {}}
    plain: dict[str, tuple[list, list]] = {}
    for at, r in zip(steps, rows, strict=True):
        for key, value in r.items():
            if key in nested and isinstance(value, Mapping):
                for name, v in value.items():
                    if is_number(v):
                        _push(nested[key], name, at, v)
            elif is_number(value) and key not in AXES:
                _push(plain, key, at, value)
    charts = []
    if "loss" in plain:
        parts = [Series("loss", *plain.pop("loss"))] + [
            Series(show.name(n), *v) for n, v in nested["terms"].items() if len(nested["terms"]) > 1
        ]
        charts.append(_chart("Loss" + (" and its terms" if len(parts) > 1 else ""), parts, stages))
    if nested["skills"]:
        parts = [Series(show.name(n), *v) for n, v in nested["skills"].items()][:8]
        share = all(0 <= y <= 1 for s in parts for y in s.y)
        charts.insert(
            0,
            _chart("Skills while training, %" if share else "Skills while training", parts, stages, percent=share, share=share),
        )
    names = sorted(plain, key=lambda k: next((i for i, f in enumerate(FIRST) if k.startswith(f)), len(FIRST)))
    for name in names[: most - len(charts)]:
        charts.append(
            _chart(NAMES.get(name, show.name(name).replace("_", " ")), [Series(show.name(name), *plain[name])], stages)
        )
    return {"charts": charts, "left": max(0, len(names) - (most - 2)), "steps": len(rows)} if charts else None


def _push(into: dict[str, tuple[list, list]], name: str, x: float, y: float) -> None:
    xs, ys = into.setdefault(name, ([], []))
    xs.append(x)
    ys.append(y)


def _rough(y: list) -> bool:
    return len(y) > ROUGH and sum(abs(b - a) for a, b in pairwise(y)) > 3 * (max(y) - min(y)) > 0


def _chart(title: str, parts: list[Series], stages: list, percent: bool = False, share: bool = False) -> dict[str, Any]:
    drawn = list(parts)
    if len(parts) == 1 and _rough(parts[0].y):  # faint, with its running mean on top
        s, width = parts[0], max(3, len(parts[0].y) // 40)
        total, mean = 0.0, []
        for i, y in enumerate(s.y):
            total += y - (s.y[i - width] if i >= width else 0.0)
            mean.append(total / min(i + 1, width))
        drawn = [Series(s.name, s.x, s.y, "s0 faint"), Series(f"{s.name}, mean of {width}", s.x, mean, "s0 smooth")]
    ends = ", ".join(f"{s.name} from {show.digits(s.y[0])} to {show.digits(s.y[-1])}" for s in parts)
    chart = svg.lines(
        drawn,
        f"{title}: {ends}",
        percent=percent,
        y_range=(-0.02, 1.04) if share else None,
        stages=stages,
        width=300,
        height=180,
    )
    legend = [
        {"name": s.name, "style": f"s{i % 8}", "last": show.level(s.y[-1]) if percent else show.digits(s.y[-1])}
        for i, s in enumerate(parts)
    ]
    return {"title": title, "chart": chart, "legend": legend}


def dial(d: Any) -> dict[str, Any] | None:
    """Strength swept: target and retained as levels, a pair of curves for each shape of the sweep, the best point within the
    budget, every point for the slider. Single skills are drawn where there is one shape."""
    if not d:
        return None
    points = [p for p in d.get("points") or [] if isinstance(p, Mapping) and is_number(p.get("strength"))]
    points = [p for p in points if is_number(p.get("target")) or is_number(p.get("retained"))]
    shapes = list(dict.fromkeys(_shape(p) for p in points))
    points.sort(key=lambda p: (shapes.index(_shape(p)), p["strength"]))
    if len(points) < 2:
        return None
    many, lines = len(shapes) > 1, []
    for shape in shapes:
        for key in ("target", "retained"):
            name = f"{key}, {shape}" if many else key
            if found := _swept(name, [p for p in points if _shape(p) == shape], lambda p, key=key: p.get(key)):
                lines.append(replace(found, style=f"s{(2 * shapes.index(shape) + (key == 'retained')) % 7}"))
    found = dict.fromkeys(n for p in points for n in (p.get("skills") or {}))
    share = lambda n: all(0 <= v <= 1 for p in points if show.is_number(v := (p.get("skills") or {}).get(n)))
    names = [n for n in found if share(n)][: 0 if many else 24]  # nats have no place on an axis of shares
    thin = [_swept(show.name(n), points, lambda p, n=n: (p.get("skills") or {}).get(n), "s7 faint") for n in names]
    thin = [s for s in thin if s and len(s.x) > 1]
    best = d.get("best") if isinstance(d.get("best"), Mapping) and is_number((d.get("best") or {}).get("strength")) else None
    of = f" ({_shape(best)})" if best and many else ""
    series = lines + thin
    levels = all(-1e-9 <= y <= 1 + 1e-9 for s in series for y in s.y)
    told = lambda s: ", ".join(f"{show.digits(x)}: {show.level(y)}" for x, y in zip(s.x, s.y, strict=True))
    chart = svg.lines(
        series,
        "The dial. " + "; ".join(f"{s.name} {told(s)}" for s in lines),
        percent=True,
        y_range=(-0.02, 1.04) if levels else None,
        x_label="strength",
        bar=(best["strength"], f"best {show.digits(best['strength'])}{of}") if best else None,
        width=460,
        height=250,
    )
    start, last = points[0], [p for p in points if best is None or _shape(p) == _shape(best)]
    full = next((p for p in last if abs(p["strength"] - 1) < 1e-9), (last or points)[-1])
    same = lambda p: bool(best) and abs(p["strength"] - best["strength"]) < 1e-9 and _shape(p) == _shape(best)
    rows = [
        {
            "strength": show.digits(p["strength"]),
            "shape": _shape(p) if many else "",
            "target": show.level(p.get("target")),
            "retained": show.level(p.get("retained")),
            "moved": _moved(start, p),
            "best": same(p),
        }
        for p in points
    ]
    legend = [{"style": s.style, "name": f"{s.name}, %"} for s in lines]
    return {
        "chart": chart,
        "rows": rows,
        "legend": legend + ([{"style": "s7 faint", "name": "single skills"}] if thin else []),
        "budget": d.get("budget"),
        "best": best,
        "said": _dial_words(d.get("budget"), best, of, start, full),
    }


def _shape(point: Mapping[str, Any]) -> str:
    return show.name(str(point.get("shape") or "merge.linear").removeprefix("merge."))


def _swept(name: str, points: list, value: Any, style: str = "") -> Series | None:
    found = [(p["strength"], value(p)) for p in points if is_number(value(p))]
    return Series(name, [x for x, _ in found], [y for _, y in found], style) if found else None


def _moved(start: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    """Of the retained skills, against the base; a sweep that does not say so begins at it."""
    if is_number(point.get("retained_change")):
        return show.signed(point["retained_change"] / 100)
    ends = point.get("retained"), start.get("retained")
    return show.signed(ends[0] - ends[1]) if all(map(is_number, ends)) else "–"


def _dial_words(budget: Any, best: Mapping[str, Any] | None, of: str, start: Mapping[str, Any], full: Mapping[str, Any]) -> str:
    limit = f" may lose at most {show.digits(budget)} points" if is_number(budget) else ""
    if best is None:
        return f"No strength keeps the retained skills within the budget: they{limit}." if limit else ""
    words = f"At strength {show.digits(best['strength'])}{of} the target is at {show.level(best.get('target'))}"
    words += f" and the retained skills change by {_moved(start, best)} points"
    if abs(best["strength"] - full["strength"]) > 1e-9:
        words += f"; at full strength it was {show.level(full.get('target'))} and {_moved(start, full)}"
    words += ": that is the base itself" if best["strength"] == 0 else ""
    return words + (f". (They{limit}.)" if limit else ".")


def compare(c: Any, most: int = 600) -> dict[str, Any] | None:
    """Several methods, several seeds: mean gain against mean loss, the front, and the same in a table."""
    points = [
        p
        for p in (c or {}).get("points") or []
        if isinstance(p, Mapping) and is_number(p.get("gain")) and is_number(p.get("loss"))
    ][:most]
    if not points:
        return None
    names = list(dict.fromkeys(_method(p) for p in points))
    methods = [(n, [(-p["loss"], p["gain"]) for p in points if _method(p) == n]) for n in names]
    mean = lambda n, key: (lambda v: sum(v) / len(v) if v else None)(
        [p[key] for p in points if _method(p) == n and is_number(p.get(key))]
    )
    edge = set(svg.front([(-mean(n, "loss"), mean(n, "gain")) for n in names]))
    rows = []
    for i, n in enumerate(names):
        got, lost = ([p[k] for p in points if _method(p) == n] for k in ("gain", "loss"))
        span = lambda v: f"{show.signed(min(v))} to {show.signed(max(v))}" if len(v) > 1 else ""
        rows.append(
            {
                "name": n,
                "style": f"s{i % 8}",
                "seeds": len(got),
                "gain": show.signed(mean(n, "gain")),
                "gains": span(got),
                "loss": show.signed(-mean(n, "loss")),
                "losses": span([-v for v in lost]),
                "front": (-mean(n, "loss"), mean(n, "gain")) in edge,
                "seconds": show.duration(mean(n, "seconds")),
                "peak": show.size(mean(n, "peak_bytes")),
                "parameters": show.brief(mean(n, "parameters")),
                "shape": svg.drawing([svg.marker("", 8, 8, f"method s{i % 8}", svg.SHAPES[i % len(svg.SHAPES)])], "", 16, 16),
            }
        )
    extra = [k for k in ("seconds", "peak", "parameters") if any(r[k] != "–" for r in rows)]
    label = "Gain against loss. " + "; ".join(f"{r['name']}: {r['gain']} gained, {r['loss']} retained" for r in rows)
    return {
        "chart": svg.pareto(methods, label),
        "rows": rows,
        "note": c.get("note"),
        "extra": extra,
        "said": _compare_words(rows, mean),
    }


def frontier(f: Any, most: int = 8) -> dict[str, Any] | None:
    """A study's lines - a level over what was varied, one line a budget - and the best point of each."""
    lines = [x for x in (f or {}).get("lines") or [] if isinstance(x, Mapping)][:most]
    points = lambda x: [
        (a, b) for a, b in zip(x.get("x") or [], x.get("y") or [], strict=False) if is_number(a) and is_number(b)
    ]
    series = [Series(show.name(x.get("name", "?")), *map(list, zip(*points(x), strict=True))) for x in lines if points(x)]
    if not series:
        return None
    label = "; ".join(
        f"{s.name}: " + ", ".join(f"{show.digits(a)}: {show.level(b)}" for a, b in zip(s.x, s.y, strict=True)) for s in series
    )
    chart = svg.lines(
        series, label, percent=True, y_range=(-0.02, 1.04), x_label=show.clip(f.get("x_label"), 60), width=460, height=280
    )
    named = lambda r: {key: show.name(r.get(key, "")) for key in ("budget", "best", "rows")}
    levels = lambda r: {"target": show.level(r.get("target")), "ci": _levels(r.get("ci95"))}
    rows = [named(r) | levels(r) for r in f.get("best") or [] if isinstance(r, Mapping)]
    legend = [{"name": s.name, "style": f"s{i % 8}", "last": ""} for i, s in enumerate(series)]
    return {
        "title": show.clip(f.get("title"), 80),
        "chart": chart,
        "legend": legend,
        "rows_label": show.clip(f.get("rows_label") or "rows", 60),
        "rows": rows,
        "said": show.clip(f.get("said"), 600),
    }


def _levels(ci: Any) -> str:
    return f"{show.level(ci[0])} to {show.level(ci[1])}" if ci and all(map(is_number, ci)) else ""


def _method(point: Mapping[str, Any]) -> str:
    return show.name(point.get("method", "?"))


def _compare_words(rows: list[dict[str, Any]], mean: Any) -> str:
    """For a comparison that brings no verdict of its own: who gained most, who lost least."""
    if len(rows) < 2:
        return ""
    most = max(rows, key=lambda r: mean(r["name"], "gain"))
    least = min(rows, key=lambda r: mean(r["name"], "loss"))
    tell = lambda r: f"{r['gain']} points on the target, {r['loss']} on what it knew"
    if most is least:
        return f"`{most['name']}` gained most and lost least: {tell(most)}."
    return f"`{most['name']}` gained most: {tell(most)}. `{least['name']}` lost least: {tell(least)}."
