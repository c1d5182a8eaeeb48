"""`temper data`: the tokens a model will see, with what is trained of them, in a terminal.

Trained tokens are green, in turn light and dark so that their borders show, and stand between the marks [[ and ]], which
survive where colours do not. End tokens appear by name, white space as marks (a dot for a blank), control characters as
pictures: what a data file holds can neither move the cursor nor hide.
"""

from __future__ import annotations

import unicodedata
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

TRAINED, END = ("#000000 on #5fd787", "#000000 on #afffd7"), "bold #ffffff on #005f00"
ROLES = {"system": "magenta", "developer": "magenta", "user": "cyan", "prompt": "cyan", "tool": "yellow", "assistant": "white"}
OTHER = "bright_black"
PIECE = "▫"  # a token that is part of a character; the character stands with its last part
BARS = " ▏▎▍▌▋▊▉█"


def visible(text: str) -> str:
    """The text of tokens: white space as marks, and what else cannot be seen as something that can."""
    return clean(text, {" ": "·", "\n": "↵\n", "\t": "→"})


def clean(text: str, marks: dict[str, str] | None = None) -> str:
    """Everything that is invisible or steers a terminal as something to see; `marks` go first."""
    marks = marks or {" ": " "}
    out = []
    for c in text:
        if c in marks:
            out.append(marks[c])
        elif ord(c) < 32 or ord(c) == 127:
            out.append(chr(0x2421 if ord(c) == 127 else 0x2400 + ord(c)))
        elif unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Zs", "Co", "Cn"):
            out.append(f"⟨{ord(c):04X}⟩")
        else:
            out.append(c)
    return "".join(out)


def example_view(shown: dict[str, Any], number: int = 1) -> RenderableType:
    """One example of `describe(...)["shown"]`."""
    parts: list[RenderableType] = []
    for side in shown["sides"]:
        n = len(side["tokens"])
        head = Text(f"{number}. {clean(shown['origin'])}", style="bold")
        for extra in (side["name"], {True: "label: true", False: "label: false"}.get(shown["label"], "")):
            head.append(f"  {extra}" if extra else "", style="yellow")
        cut = f", {side['cut']} cut off" if side["cut"] else ""
        head.append(f"  {n} tokens, {side['trained']} trained{cut}", style="dim")
        parts += [head, _tokens(side["tokens"]), Text()]
    return Group(*parts)


def _tokens(tokens: list[list]) -> Text:
    out, inside = Text(overflow="fold"), False
    for k, (text, _, weight, role) in enumerate(tokens):
        if (weight > 0) != inside:
            inside = weight > 0
            out.append("[[" if inside else "]]", style="bold green")
        shown = visible(text) or PIECE
        if weight > 0:
            out.append(shown, style=END if role == "end" else TRAINED[k % 2])
            if weight != 1:
                out.append(f"×{weight:g}", style="green")
        else:
            out.append(shown, style=ROLES.get(role, OTHER))
    if inside:
        out.append("]]", style="bold green")
    return out


def totals_view(described: dict[str, Any], notes: list[str] | tuple[str, ...] = ()) -> RenderableType:
    """The totals of `describe(...)`, a line each; what needs attention in yellow."""
    t, lines = described["totals"], []
    say = lambda text, style="": lines.append(Text(text, style=style))
    plural = lambda n, what: f"{n:,} {what}{'' if n == 1 else 's'}"
    trained = f"{t['trained']:,} trained ({t['share']:.1%})"
    say(f"{plural(t['examples'], 'example')}, {plural(t['tokens'], 'token')}, of which {trained}", "bold")
    ln = t["lengths"]
    say(f"length: {ln['shortest']} to {ln['longest']}, median {ln['median']}, nine in ten up to {ln['p90']}")
    most = max((n for _, n in t["histogram"]), default=1)
    for bound, n in t["histogram"]:
        eighths = round(n / most * 240)
        bar = "█" * (eighths // 8) + BARS[eighths % 8].strip()
        lines.append(Text(f"  up to {bound:>6}  {n:>7,}  ").append(bar, style="green"))
    names = ", ".join(f"{k.removesuffix('_token')} {clean(v)} ({i})" for k, (v, i) in described["special"].items())
    say(f"special tokens: {names}", "dim")
    for n, what in (
        (t["truncated"], "truncated: the end of some answers may be missing"),
        (t["duplicates"], "repeat an earlier one token for token"),
        (t["borders"], "have a token across the border of prompt and completion; it counts as completion"),
    ):
        if n:
            say(f"{n:,} {what}", "yellow")
    for note in notes:
        say(clean(note), "yellow")
    if t["bad"]:
        say(f"{plural(len(t['bad']), 'row')} cannot be used:", "bold red")
        for b in t["bad"][:10]:
            say(f"  {clean(b['file'])}:{b['line']}  {clean(b['reason'])}", "red")
        if len(t["bad"]) > 10:
            say(f"  and {len(t['bad']) - 10:,} more", "red")
    return Group(*lines)


def tokens_view(described: dict[str, Any], notes: list[str] | tuple[str, ...] = ()) -> RenderableType:
    """All of it: `console.print(tokens_view(describe(...), rows.notes))`."""
    legend = Text().append("[[", style="bold green").append("trained", style=TRAINED[0]).append("]]", style="bold green")
    legend.append("  ").append("end token", style=END).append("  ").append("asked", style="cyan").append("  ")
    legend.append("template", style=OTHER).append("   · blank   ↵ new line   → tab   ▫ part of a character", style="dim")
    shown = [example_view(s, i + 1) for i, s in enumerate(described["shown"])]
    return Group(legend, Text(), *shown, totals_view(described, notes))
