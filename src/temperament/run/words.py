"""The ledger in words: what was gained, what was lost, and what could not have been seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from temperament import stats

if TYPE_CHECKING:
    from temperament.run.change import Change


def verdict(changes: Sequence[Change]) -> str:
    """A few honest sentences: what was gained, what was lost, and what could not have been seen."""
    measured = [c for c in changes if c.change is not None]
    target = [c for c in measured if c.role == "target"]
    others = [c for c in measured if c.role == "retained"]
    said = []
    for mood, start in (("gained", "Gained"), ("lost", "Lost on the target")):
        if found := sorted((c for c in target if c.seen == mood), key=_size):
            said.append(f"{start} {_list([_moved(c, i == 0) for i, c in enumerate(found)])}.")
    if unseen := [c for c in target if c.seen == "none"]:
        tails = [f"`{c.name}` ({_span(c)}{_unseen_gain(c)})" for c in unseen]
        said.append(f"No gain seen on {_list(tails)}.")
    if moved := [c for c in unseen if c.nll and not c.nll.ci95[0] <= 0 <= c.nll.ci95[1]]:
        way = lambda c: "more" if c.nll.change < 0 else "less"
        span = lambda c: f"NLL {c.nll.before:.2f} to {c.nll.after:.2f} nats a token"
        told = [f"of `{c.name}` grew {way(c)} likely ({span(c)})" for c in moved]
        said.append(f"Below the surface the right answers {_list(told)}.")
    if fresh := [c for c in changes if c.role == "target" and c.change is None and c.after is not None]:
        ends = _list([f"`{c.name}` ends at {level(c.after, c.unit)}" for c in fresh])
        said.append(f"The base has no score to compare with: {ends}.")
    if lost := sorted((c for c in others if c.seen == "lost"), key=_size):
        said.append(f"Lost {_list([_moved(c, i == 0) for i, c in enumerate(lost)])}.")
    if gained := sorted((c for c in others if c.seen == "gained"), key=_size):
        said.append(f"Also better: {_list([f'`{c.name}` ({_span(c, i == 0)})' for i, c in enumerate(gained)])}.")
    quiet = [c for c in others if c.seen == "none"]
    if sharp := [c for c in quiet if not c.blind]:
        words = f"Nothing {'else ' if lost else ''}seen lost on {_list([f'`{c.name}`' for c in sharp], most=4)}"
        weakest = max((c for c in sharp if c.power is not None and c.unit == "points"), key=lambda c: c.power, default=None)
        said.append(words + (f", but {weakest.sentence()}." if weakest else "."))
    if blind := [c for c in quiet if c.blind]:
        names = _list([f"`{c.name}`" for c in blind], most=4)
        said.append(f"On {names} no loss could have been seen: too little to lose, or too few items.")
    if drift := [c for c in quiet if c.nll and c.nll.ci95[0] > 0 and c.nll.change > 0.01]:
        most = max(drift, key=lambda c: c.nll.change)
        rise = f"NLL {most.nll.change:+.2g} nats a token"
        said.append(f"Below the surface the right answers of `{most.name}` grew less likely ({rise}).")
    if len(others) >= 10:
        chance = len(others) * (1 - stats.LEVEL)
        said.append(f"Of {len(others)} retained skills about {chance:.2g} would seem changed by chance alone.")
    if not target and not fresh:
        said.insert(0, "No target skill was named.")
    if not others:
        said.append("No retained skill was measured, so nothing can be said about loss.")
    return " ".join(said)


def sentence(c: Change) -> str | None:
    """What this suite could not have seen: "with 26 items a loss under 20 points is invisible" (at 80 % power)."""
    if c.power is None:
        return None
    if c.blind:
        return f"with {c.n} items and a start of {level(c.before, c.unit)} no loss could have been seen"
    return f"with {c.n} items a loss under {amount(c.power, c.unit)} is invisible"


def level(x: float | None, unit: str) -> str:
    if x is None:
        return "none"
    return f"{_round(100 * x)} %" if unit == "points" else f"{x:.3g}" + (f" {unit}" if unit else "")


def amount(x: float, unit: str) -> str:
    if unit != "points":
        return f"{x:.2g}" + (f" {unit}" if unit else "")
    shown = _round(100 * x)
    return f"{shown} point" + ("" if shown == "1" else "s")


def _round(x: float) -> str:
    return f"{x:.0f}" if abs(x) >= 1 or abs(x) < 0.05 else f"{x:.1f}"


def _span(c: Change, interval: bool = True) -> str:
    scale = 100 if c.unit == "points" else 1
    ci = ""
    if interval and c.ci95 is not None:
        low, high = (f"{_signed(scale * v)}" if c.unit == "points" else f"{v:+.2g}" for v in c.ci95)
        ci = f", 95 % interval {low} to {high}"
    start = f"floor {level(c.before, c.unit)}" if c.floor else level(c.before, c.unit)
    return f"{start} to {level(c.after, c.unit)}{ci}"


def _signed(x: float) -> str:
    return ("+" if x >= 0 else "-") + _round(abs(x))


def _moved(c: Change, interval: bool = True) -> str:
    return f"{amount(abs(c.change), c.unit)} on `{c.name}` ({_span(c, interval)})"


def _unseen_gain(c: Change) -> str:
    return f"; with {c.n} items a gain under {amount(c.power, c.unit)} is invisible" if c.power is not None else ""


def _size(c: Change) -> tuple[bool, float]:
    return c.unit != "points", -abs(c.change)


def _list(words: Sequence[str], most: int = 3) -> str:
    most = most if len(words) > most + 1 else len(words)  # "and 1 more" says less than its name
    shown = list(words[:most])
    if len(words) > most:
        shown.append(f"{len(words) - most} more")
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " and " + shown[-1]
