"""Draws docs/pictures/merging.svg, which merge for which need.   python docs/pictures/merging.py

Five cards, one for each thing one can have; in each a sketch of it, and the wishes with the methods that grant them.
"""

from pathlib import Path

INK, SOFT, LINE, CARD, BLUE, ORANGE = "#1b2430", "#5d6875", "#d5dbe2", "#ffffff", "#1668a8", "#b85c00"
WIDTH, LEFT, GAP, ROW = 860, 232, 14, 27

CARDS = [
    ("one tuned model", "that forgot too much", "one", [
        ("nearly all of both back", ["lines"]),
        ("the plainest trade: one number", ["linear"]),
        ("it was LoRA at a high rate", ["scale_intruders"]),
        ("a quick look at what is lost for good", ["half_reset"]),
    ]),
    ("several runs", "of one task, from one base", "runs", [
        ("held-out items to choose by", ["soup_greedy", "soup_learned"]),
        ("no data at hand", ["soup_uniform", "model_stock"]),
    ]),
    ("several skills", "learned apart, from one base", "skills", [
        ("two tempers: domain and instruct", ["slerp", "karcher", "multislerp"]),
        ("two to four tasks", ["ties", "task_arithmetic"]),
        ("many tasks, one setting", ["breadcrumbs"]),
        ("large, redundant changes", ["dare", "della", "sce"]),
        ("sparse changes", ["sparse_sum"]),
    ]),
    ("two origins", "trained from different starts", "origins", [
        ("one model of the same width, or a little wider", ["pleas"]),
    ]),
    ("one skill to move", "or layers to stack", "move", [
        ("its smallest part, on another model", ["graft"]),
        ("8 to 50 times smaller on disk", ["compeft"]),
        ("a deeper model of layers of several", ["passthrough"]),
    ]),
]  # fmt: skip


def text(x, y, words, size=13, fill=INK, weight="normal", anchor="start", family="sans-serif") -> str:
    return (f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" font-weight="{weight}" text-anchor="{anchor}" '
            f'font-family="{family}">{words}</text>')  # fmt: skip


def dot(x, y, fill=INK, r=4.5) -> str:
    return f'<circle cx="{x}" cy="{y}" r="{r}" fill="{fill}"/>'


def arrow(x, y, u, v, fill=SOFT, dash="") -> str:
    style = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line x1="{x}" y1="{y}" x2="{u}" y2="{v}" stroke="{fill}" stroke-width="1.5"{style}/>'


def sketch(kind: str, y: float) -> list[str]:
    """Black: what there is; orange: the merge. About 56 wide, 44 high."""
    x = 44
    b, s = (x, y + 18), SOFT
    if kind == "one":
        return [arrow(*b, x + 52, y - 16), dot(*b), dot(x + 52, y - 16), dot(x + 31, y - 2, ORANGE, 5.5)]
    if kind == "runs":
        ends = [(x + 30, y - 20), (x + 56, y - 11), (x + 52, y + 14)]
        return [*(arrow(*b, *e) for e in ends), dot(*b), *(dot(*e) for e in ends), dot(x + 46, y - 5, ORANGE, 5.5)]
    if kind == "skills":
        ends = [(x + 8, y - 20), (x + 56, y + 14)]
        return [*(arrow(*b, *e) for e in ends), dot(*b), *(dot(*e) for e in ends), dot(x + 44, y - 12, ORANGE, 5.5)]
    if kind == "origins":
        a, e = (x + 4, y - 16), (x + 54, y + 16)
        return [arrow(*a, x + 29, y, s, "3 3"), arrow(*e, x + 29, y, s, "3 3"), dot(*a), dot(*e), dot(x + 29, y, ORANGE, 5.5)]
    bar = lambda k, fill: f'<rect x="{x + 6}" y="{y - 20 + 11 * k}" width="44" height="8" rx="2" fill="{fill}"/>'
    return [bar(0, INK), bar(1, ORANGE), bar(2, INK), bar(3, LINE)]


def chips(x: float, y: float, names: list[str]) -> list[str]:
    out = []
    for name in names:
        width = 7.3 * len(name) + 18
        out.append(f'<rect x="{x:.1f}" y="{y - 15}" width="{width:.1f}" height="21" rx="10.5" fill="#e8f1f8"/>')
        out.append(text(f"{x + width / 2:.1f}", y, name, 12, BLUE, "600", "middle", "monospace"))
        x += width + 7
    return out


def main() -> None:
    body, y = [], 58.0
    for title, under, kind, wishes in CARDS:
        height = max(ROW * len(wishes) + 22, 66)
        middle = y + height / 2
        body.append(f'<rect x="16" y="{y:.1f}" width="{WIDTH - 32}" height="{height}" rx="10" fill="{CARD}" stroke="{LINE}"/>')
        body += sketch(kind, middle)
        body += [text(122, f"{middle - 3:.1f}", title, 14, INK, "600"), text(122, f"{middle + 14:.1f}", under, 11, SOFT)]
        first = middle - ROW * (len(wishes) - 1) / 2 + 5
        for k, (wish, names) in enumerate(wishes):
            at = first + ROW * k
            body.append(text(LEFT + 84, f"{at:.1f}", wish, 13))
            body += chips(LEFT + 366, at, names)
        y += height + GAP
    height = y + 26
    head = [text(24, 36, "Which merge for which need", 17, INK, "600"), text(LEFT + 84, 36, "you want", 12, SOFT),
            text(LEFT + 366, 36, "take merge. ...", 12, SOFT)]  # fmt: skip
    foot = dot(30, y + 8, ORANGE, 5.5) + text(42, y + 12, "the merge", 12, SOFT)
    foot += dot(118, y + 8) + text(130, y + 12, "what you have", 12, SOFT)
    page = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}" '
            'role="img" aria-label="Which merge for which need">',
            f'<rect width="{WIDTH}" height="{height:.0f}" rx="12" fill="#f6f8fa"/>', *head, *body, foot, "</svg>"]  # fmt: skip
    Path(__file__).with_suffix(".svg").write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
