"""Which items a page can carry, and where two outputs differ.

Every lost item comes first, then what the targets missed, then gained, then samples of the rest, taken in turns from each
skill, until the budget is spent; what was left out is counted and said.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from temperament.report import show
from temperament.report.show import clip

ORDER = ("lost", "wanted", "gained", "kept", "missed", None)  # wanted: missed, of a target
FIELDS = ("prompt", "expected", "before", "after")
PICTURES = ("image", "image_before", "image_after")  # of what was asked; or what each made


@dataclass(frozen=True)
class Picked:
    items: list[dict[str, Any]]
    totals: dict[str, int]  # by status, of all items
    shown: dict[str, int]

    @property
    def all(self) -> int:
        return sum(self.totals.values())


def pick(
    items: Mapping[str, Sequence[Mapping[str, Any]]], budget: int, most: int, text: int = 900, targets: Container[str] = ()
) -> Picked | None:
    """At most `most` items and `budget` bytes of page; long texts are clipped to `text` characters with a stated remainder."""
    items = {str(k): [i for i in rows if isinstance(i, Mapping)] for k, rows in items.items()}
    by_status: dict[Any, list[tuple[str, Mapping[str, Any]]]] = {s: [] for s in ORDER}
    totals: dict[str, int] = {}
    kind = lambda skill, i: "wanted" if _status(i) == "missed" and skill in targets else _status(i)
    for state in ORDER:
        queues = [[(skill, i) for i in rows if kind(skill, i) == state] for skill, rows in items.items()]
        for turn in range(max(map(len, queues), default=0)):
            by_status[state] += [q[turn] for q in queues if turn < len(q)]
        if by_status[state]:
            totals[_called(state)] = totals.get(_called(state), 0) + len(by_status[state])
    left, chosen, shown = budget, [], {}
    # of what is left: every kind gets a place
    rooms = {"lost": 0.55, "wanted": 0.35, "gained": 0.5, "kept": 0.6, "missed": 1.0, None: 1.0}
    for state in ORDER:
        room, count = int(left * rooms[state]), int((most - len(chosen)) * rooms[state])
        if sum(map(len, by_status.values())) <= most:
            count = most
        for skill, item in by_status[state]:
            row = {"skill": show.name(skill), "status": _called(state), "id": item.get("id", "")}
            row |= {f: None if item.get(f) is None else clip(item[f], text) for f in FIELDS}
            row |= {f: item.get(f) for f in ("score_before", "score_after")}
            row |= {f: show.picture(item.get(f)) for f in PICTURES}
            cost = 700 + sum(len(row[f] or "") for f in PICTURES)
            cost += sum(2 * len(escape(row[f] or "").encode("utf-8", "replace")) for f in FIELDS)
            if cost > room or count <= 0:
                break
            room, left, count = room - cost, left - cost, count - 1
            chosen.append(row)
            shown[row["status"]] = shown.get(row["status"], 0) + 1
    return Picked(chosen, totals, shown) if chosen else None


def _status(item: Mapping[str, Any]) -> str | None:
    return item.get("status") if item.get("status") in ("lost", "gained", "kept", "missed") else None


def _called(state: str | None) -> str:
    return {"wanted": "missed", None: "measured"}.get(state, state)


def differences(before: str | None, after: str | None) -> tuple[Markup, Markup]:
    """Both texts escaped, the words only one of them has marked. Unlike texts stay unmarked: a page of marks says nothing."""
    a, b = before or "", after or ""
    if a == b or not a or not b or len(a) + len(b) > 1600:
        return escape(a), escape(b)
    x, y = (re.findall(r"\s+|\w+|[^\w\s]", t) for t in (a, b))
    match = difflib.SequenceMatcher(None, x, y, autojunk=False)
    if match.ratio() < 0.35:
        return escape(a), escape(b)
    left, right = Markup(), Markup()
    for kind, i0, i1, j0, j1 in match.get_opcodes():
        old, new = escape("".join(x[i0:i1])), escape("".join(y[j0:j1]))
        same = kind == "equal"
        left += old if same or not old else Markup("<del>%s</del>") % old
        right += new if same or not new else Markup("<ins>%s</ins>") % new
    return left, right
