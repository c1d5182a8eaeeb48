"""A small SVG kit: elements, axes, lines, scatter, and the before/after track of a skill. No other charting code exists here.

Colours and strokes come from classes (`templates/chart.css`), so one drawing is light and dark, on screen, on paper and in a
standalone picture. Every string is escaped by `el`; every mark has a hover title; every drawing a label for screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from temperament.report.show import digits

MARKS = {  # shapes tell what colours tell: up, down, neither
    "gained": "M0,-7 L6.5,5 L-6.5,5 Z",
    "lost": "M0,7 L6.5,-5 L-6.5,-5 Z",
    "none": "M0,-6 L6,0 L0,6 L-6,0 Z",
}
SHAPES = (  # one a method, in a scatter
    "M-5.5,0 A5.5,5.5 0 1 0 5.5,0 A5.5,5.5 0 1 0 -5.5,0 Z", "M-5,-5 H5 V5 H-5 Z", "M0,-6.5 L6.5,0 L0,6.5 L-6.5,0 Z",
    "M0,-6.5 L6,4.5 L-6,4.5 Z", "M0,6.5 L6,-4.5 L-6,-4.5 Z", "M-2,-6 H2 V-2 H6 V2 H2 V6 H-2 V2 H-6 V-2 H-2 Z",
)  # fmt: skip


@dataclass(frozen=True)
class Series:
    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = ""  # more classes


def el(name: str, *children: object, **attrs: object) -> Markup:
    """One element; `class_` is class, a_b is a-b, None is left out; strings among the children are escaped."""
    parts = [f'{k.rstrip("_").replace("_", "-")}="{escape(_number(v))}"' for k, v in attrs.items() if v is not None]
    inner = "".join(str(escape(c)) for c in children if c is not None)
    return Markup(f"<{' '.join([name, *parts])}>{inner}</{name}>")


def _number(v: object) -> object:
    return f"{v:.2f}".rstrip("0").rstrip(".") if isinstance(v, float) else v


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers covering [low, high]: steps of 1, 2, 2.5 or 5 times a power of ten."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Plane:
    """A drawing area in data units."""

    x0: float
    x1: float
    y0: float
    y1: float
    width: int = 360
    height: int = 200
    left: int = 42
    right: int = 14
    top: int = 10
    bottom: int = 38

    def px(self, x: float) -> float:
        return self.left + (x - self.x0) / ((self.x1 - self.x0) or 1) * (self.width - self.left - self.right)

    def py(self, y: float) -> float:
        return self.height - self.bottom - (y - self.y0) / ((self.y1 - self.y0) or 1) * (self.height - self.top - self.bottom)

    def axes(
        self, x_label: str = "", percent: bool = False, y_ticks: Sequence[float] | None = None, x_percent: bool = False
    ) -> Markup:
        out = []
        for y in ticks(self.y0, self.y1) if y_ticks is None else y_ticks:
            at = self.py(y)
            text = digits(round(100 * y if percent else y, 9))
            out.append(el("line", x1=float(self.left), x2=float(self.width - self.right), y1=at, y2=at, class_="grid"))
            out.append(el("text", text, x=float(self.left - 6), y=at + 3.5, class_="tick end"))
        spots = ticks(self.x0, self.x1, 5 if self.width > 330 else 4)
        for x in spots:
            text = digits(round(100 * x if x_percent else x, 9))
            side = " end" if self.px(x) > self.width - 22 else ""
            out.append(
                el(
                    "text",
                    text,
                    x=min(self.px(x), self.width - 4.0),
                    y=float(self.height - self.bottom + 15),
                    class_="tick mid" + side,
                )
            )
        if x_label:
            out.append(el("text", x_label, x=float(self.width - self.right), y=float(self.height - 5), class_="axis end"))
        return Markup("").join(out)


def thin(x: Sequence[float], y: Sequence[float], most: int = 240) -> tuple[list[float], list[float]]:
    """At most `most` points that keep the envelope: the lowest and highest of each run of points, in order."""
    n = len(x)
    if n <= most:
        return list(x), list(y)
    keep, bins = {0, n - 1}, most // 2 - 1
    for b in range(bins):
        rows = range(b * n // bins, (b + 1) * n // bins)
        keep |= {min(rows, key=y.__getitem__), max(rows, key=y.__getitem__)}
    rows = sorted(keep)
    return [x[i] for i in rows], [y[i] for i in rows]


def lines(
    series: Sequence[Series],
    label: str,
    *,
    percent: bool = False,
    y_range: tuple[float, float] | None = None,
    x_label: str = "step",
    stages: Sequence[tuple[float, str]] = (),
    bar: tuple[float, str] | None = None,
    width: int = 360,
    height: int = 200,
) -> Markup:
    """Curves on one plane. `stages` are dotted verticals with a word, `bar` one strong vertical (the chosen point)."""
    xs = [v for s in series for v in s.x]
    ys = [v for s in series for v in s.y]
    low, high = y_range or (min(ys), max(ys))
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    elif y_range is None:
        low, high = low - 0.04 * (high - low), high + 0.06 * (high - low)
    plane = Plane(min(xs), max(xs), low, high, width, height, top=24 if bar or stages else 10)
    out = [plane.axes(x_label, percent)]
    for at, word in stages:
        out.append(el("line", x1=plane.px(at), x2=plane.px(at), y1=plane.py(low), y2=plane.py(high), class_="stage"))
        out.append(el("text", word, x=plane.px(at), y=float(plane.top - 8), class_="axis"))
    if bar is not None:
        out.append(el("line", x1=plane.px(bar[0]), x2=plane.px(bar[0]), y1=plane.py(low), y2=plane.py(high), class_="bar"))
        side = " end" if plane.px(bar[0]) > width * 0.6 else ""
        out.append(el("text", bar[1], x=plane.px(bar[0]) + (3 if side else -3), y=float(plane.top - 9), class_="strong" + side))
    for i, s in enumerate(series):
        x, y = thin(s.x, s.y)
        points = [(plane.px(a), plane.py(min(max(b, low), high))) for a, b in zip(x, y, strict=True)]
        style = s.style if s.style.startswith("s") and s.style[1:2].isdigit() else f"s{i % 8} {s.style}".strip()
        if len(points) > 1:
            out.append(el("polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in points), class_=f"curve {style}"))
        every = max(1, len(points) // 40)
        for k in range(0, len(points), every):
            value = f"{100 * y[k]:.1f} %" if percent else digits(y[k])
            ghost = len(points) > 24 or "faint" in style
            seen = "dot ghost" if ghost else "dot"
            title = el("title", f"{s.name}: {value} at {digits(x[k])}")
            out.append(el("circle", title, cx=points[k][0], cy=points[k][1], r=7.0 if ghost else 3.0, class_=f"{seen} {style}"))
    return drawing(out, label, width, height)


def drawing(parts: Sequence[Markup], label: str, width: int, height: int) -> Markup:
    return el(
        "svg",
        *parts,
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=label,
        class_="chart wide" if width > 400 else "chart",
    )


def marker(kind: str, x: object, y: object, classes: str, path: str | None = None, title: str | None = None) -> Markup:
    """A mark at (x, y), either of which may be a percentage."""
    inner = el("path", el("title", title) if title else None, d=path or MARKS[kind], class_=classes)
    return el("svg", inner, x=x, y=y, overflow="visible", width=1, height=1)


def track(
    before: float | None, after: float | None, ci: Sequence[float] | None, low: float, high: float, seen: str, label: str
) -> Markup:
    """One skill: a hollow circle before, a shape after (up gained, down lost, diamond neither), a band for its interval.

    Percentages, not pixels: it fills any width at one text size.
    """
    at = lambda v: f"{2 + 96 * (min(max(v, low), high) - low) / ((high - low) or 1):.2f}%"
    out = [el("title", label)]
    for k in range(5):
        spot = at(low + k * (high - low) / 4)
        out.append(el("line", x1=spot, x2=spot, y1=4, y2=26, class_="grid"))
    out.append(el("line", x1=at(low), x2=at(high), y1=15, y2=15, class_="grid"))
    if ci and before is not None:
        start, end = at(before + ci[0]), at(before + ci[1])
        width = f"{max(float(end[:-1]) - float(start[:-1]), 0.4):.2f}%"
        out.append(el("rect", x=start, y=10, width=width, height=10, rx=5, class_=f"band {seen}"))
    if before is not None and after is not None:
        out.append(el("line", x1=at(before), x2=at(after), y1=15, y2=15, class_=f"change {seen}"))
    if before is not None:
        out.append(el("circle", cx=at(before), cy=15, r=4.5, class_="before"))
    if after is not None:
        out.append(marker(seen, at(after), 15, f"after {seen}"))
    return el("svg", *out, role="img", aria_label=label, class_="track", width="100%", height=30)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points no other beats in both coordinates (higher is better in each), from left to right."""
    best, out = -math.inf, []
    for x, y in sorted(set(points), key=lambda p: (-p[0], -p[1])):
        if y > best:
            out.append((x, y))
            best = y
    return out[::-1]


def trials(points: Sequence[tuple[float, float]], best: tuple[float, float], label: str, budget: float = 0.0) -> Markup:
    """What a search tried: kept (right) against gained (up); dashed the front, large what was chosen; left of the budget's
    line more was lost than wanted."""
    width, height = 420, 300
    xs, ys = [p[0] for p in points] + [0.0], [p[1] for p in points] + [0.0]
    xs += [-budget]
    pad_x, pad_y = (0.08 * ((max(v) - min(v)) or 0.1) for v in (xs, ys))
    plane = Plane(
        min(xs) - pad_x, max(xs) + pad_x, min(ys) - pad_y, max(ys) + pad_y, width, height, left=46, right=16, top=26, bottom=46
    )
    out = [plane.axes(percent=True, x_percent=True)]
    out.append(el("text", "gained on the target, points", x=4.0, y=13.0, class_="axis"))
    out.append(el("text", "change of what it knew, points", x=float(width - 16), y=float(height - 8), class_="axis end"))
    out.append(el("line", x1=plane.px(0), x2=plane.px(0), y1=float(plane.top), y2=plane.py(plane.y0), class_="zero"))
    if budget:
        at = plane.px(-budget)
        out.append(el("line", x1=at, x2=at, y1=float(plane.top), y2=plane.py(plane.y0), class_="zero"))
        out.append(el("text", "budget", x=at - 4, y=plane.py(plane.y0) - 6, class_="axis end"))
    edge = front(points)
    if len(edge) > 1:
        out.append(el("polyline", points=" ".join(f"{plane.px(x):.1f},{plane.py(y):.1f}" for x, y in edge), class_="front"))
    for x, y in points:
        title = el("title", f"{100 * y:+.1f} gained, {100 * x:+.1f} retained")
        out.append(el("circle", title, cx=plane.px(x), cy=plane.py(y), r=3.4 if (x, y) in edge else 2.6, class_="seed s0"))
    x, y = plane.px(best[0]), plane.py(best[1])
    out.append(marker("", x, y, "method s1", SHAPES[0], "chosen"))
    left = x > width * 0.62
    out.append(el("text", "chosen", x=x + (-11 if left else 11), y=y + 4, class_="name s1" + (" end" if left else "")))
    return drawing(out, label, width, height)


def pareto(
    methods: Sequence[tuple[str, Sequence[tuple[float, float]]]], label: str, width: int = 420, height: int = 300
) -> Markup:
    """Gain (up) against what was kept (right: lost nothing). Small marks are seeds, large ones means, dashed the front."""
    every = [p for _, points in methods for p in points]
    xs, ys = [p[0] for p in every] + [0.0], [p[1] for p in every]
    pad_x = 0.08 * ((max(xs) - min(xs)) or 0.1)
    pad_y = 0.12 * ((max(ys) - min(ys)) or 0.1)
    plane = Plane(
        min(xs) - pad_x, max(xs) + pad_x, min(ys) - pad_y, max(ys) + pad_y, width, height, left=46, right=16, top=26, bottom=46
    )
    out = [plane.axes(percent=True, x_percent=True)]
    out.append(el("text", "gained on the target, points", x=4.0, y=13.0, class_="axis"))
    out.append(el("text", "change of what it knew, points", x=float(width - 16), y=float(height - 8), class_="axis end"))
    out.append(el("line", x1=plane.px(0), x2=plane.px(0), y1=float(plane.top), y2=plane.py(plane.y0), class_="zero"))
    means = [(sum(p[0] for p in points) / len(points), sum(p[1] for p in points) / len(points)) for _, points in methods]
    edge = front(means)
    if len(edge) > 1:
        steps = " ".join(f"{plane.px(x):.1f},{plane.py(y):.1f}" for x, y in edge)
        out.append(el("polyline", points=steps, class_="front"))
    for i, (name, points) in enumerate(methods):
        for x, y in points if len(points) > 1 else ():
            title = el("title", f"{name}, one seed: {100 * y:+.1f} gained, {100 * x:+.1f} retained")
            out.append(el("circle", title, cx=plane.px(x), cy=plane.py(y), r=2.6, class_=f"seed s{i % 8}"))
    placed: list[tuple[float, float]] = []
    for i, ((name, _), (x, y)) in enumerate(zip(methods, means, strict=True)):
        px, py = plane.px(x), plane.py(y)
        out.append(
            marker(
                "",
                px,
                py,
                f"method s{i % 8}",
                SHAPES[i % len(SHAPES)],
                f"{name}: {100 * y:+.1f} gained, {100 * x:+.1f} retained",
            )
        )
        left = px > width * 0.62
        ty = py + 4
        while any(abs(ty - b) < 13 and abs(px - a) < 120 for a, b in placed) and ty < height - plane.bottom - 4:
            ty += 13
        placed.append((px, ty))
        shown = name if len(name) < 28 else name[:27] + "…"
        out.append(el("text", shown, x=px + (-11 if left else 11), y=ty, class_=f"name s{i % 8}" + (" end" if left else "")))
    return drawing(out, label, width, height)
