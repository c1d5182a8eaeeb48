"""Draws docs/pictures/plane.svg: where merges of two tuned models lie, computed with the parts themselves.

Two random changes of one base, 20,000 entries, cosine 0.3. Each merge is projected on the plane through base, A and B; the ring
around it is what the plane does not show (its distance from the plane).   python docs/pictures/plane.py
"""

from pathlib import Path

import torch

from temperament import parts
from temperament.delta import Delta, Dense

N, COSINE, SCALE, X0, Y0 = 20_000, 0.3, 300.0, 90.0, 400.0
SHOWN = [
    ("mean", "merge.linear", (10, 16)),
    ("task arithmetic", "merge.task_arithmetic", (10, -6)),
    ("model stock", "merge.model_stock", (10, 14)),
    ("multislerp", "merge.multislerp", (10, 2)),
    ("TIES 0.2", {"merge.ties": {"density": 0.2}}, (10, 2)),
    ("DARE 0.5 (mean)", {"merge.dare": {"density": 0.5, "normalise": True}}, (-126, -4)),
    ("breadcrumbs", {"merge.breadcrumbs": {"density": 0.5, "gamma": 0.02, "normalise": True}}, (-92, 6)),
]


def main() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, N, generator=g)
    b = COSINE * a + (1 - COSINE**2) ** 0.5 * b
    a, b = a / a.norm(), b / b.norm()
    base = {"w": torch.zeros(100, N // 100)}
    deltas = [Delta({"lm/w": Dense(v.view(100, -1))}) for v in (a, b)]
    up = torch.nn.functional.normalize(b - (a @ b) * a, dim=0)
    at = lambda v: (
        X0 + SCALE * float(v @ a),
        Y0 - SCALE * float(v @ up),
        SCALE * float((v - (v @ a) * a - (v @ up) * up).norm()),
    )
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="50 85 590 360" font-family="sans-serif" font-size="13">',
           '<rect width="640" height="450" fill="white"/>']  # fmt: skip
    points = {"base": at(torch.zeros(N)), "A": at(a), "B": at(b)}
    for end in "AB":
        out.append(_line(points["base"], points[end], "#888"))
    out.append(_line(points["A"], points["B"], "#bbb"))
    for name, (x, y, _) in points.items():
        aside = (-20, 4) if name == "B" else (-14, 20)
        out += [_dot(x, y, 5, "#333"), _text(name, x + aside[0], y + aside[1], "#333")]
    for name, method, (dx, dy) in SHOWN:
        merged = parts.build(method).merge(base, deltas).changes["lm/w"].delta().reshape(-1)
        x, y, away = at(merged)
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{away / 4:.1f}" fill="#1668a8" opacity="0.10"/>')
        out += [_dot(x, y, 3.5, "#1668a8"), _text(name, x + dx, y + dy, "#1668a8")]
    out.append('<text x="330" y="432" fill="#666">halo: distance from the plane, a quarter of its size</text></svg>')
    Path(__file__).with_suffix(".svg").write_text("\n".join(out) + "\n", encoding="utf-8")


def _dot(x: float, y: float, r: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="{colour}"/>'


def _text(text: str, x: float, y: float, colour: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{text}</text>'


def _line(p: tuple, q: tuple, colour: str) -> str:
    return f'<line x1="{p[0]:.1f}" y1="{p[1]:.1f}" x2="{q[0]:.1f}" y2="{q[1]:.1f}" stroke="{colour}" stroke-dasharray="4 3"/>'


if __name__ == "__main__":
    main()
