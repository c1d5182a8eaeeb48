"""Recall and tracking: the answer stands in the context. Splits are by the whole context, so a held-out item is a new one.

Retrieval forms late in training, so `dense` documents ask many questions of one context, each answer closed by its own end
token (else a model learns to go on asking), and one way of asking puts the thing right before the answer, as in the context.
"""

from __future__ import annotations

from .draw import Draw
from .procedures import COLOURS, LETTERS, OBJECTS
from .skill import NOT_SMALL, Made, Skill

END = "</s>"
ASK_COLOUR = ("\nQ: What colour is the {}?\nA:", "\nQ: The {} has which colour?\nA:", "\nSo: {}")
ASK_PLACE = ("\nQ: Where is the {}?\nA:", "\nQ: Which box holds the {}?\nA:", "\nNow: {}")
BOXES = "ABCDEF"


def closed(parts: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """The last end token is the document's own."""
    return [*parts[:-1], (parts[-1][0].removesuffix(END), True)]


def _map(draw: Draw, high: int = 8) -> tuple[str, list[str], list[str]]:
    """Context, keys and values: letters with digits, or things with colours, boxes or letters."""
    kind = draw.below(4)
    if kind == 0:
        names = draw.sample(LETTERS, draw.between(2, high))
        values = [str(draw.below(10)) for _ in names]
    else:
        names = draw.sample(OBJECTS, draw.between(2, high))
        values = [" " + draw.choice((COLOURS, BOXES, LETTERS)[kind - 1]) for _ in names]
    return "map:" + "".join(f" {k}{v}" for k, v in zip(names, values, strict=True)), names, values


def keys(draw: Draw) -> Made:
    """'map: k7 b3 x9 | b' -> '3'; 'map: cup red door blue | cup' -> ' red'."""
    context, names, values = _map(draw)
    i = draw.below(len(names))
    return Made((context,), f"{context} | {names[i]}", values[i], values[i].strip(), {"length": len(names)})


def keys_dense(draw: Draw) -> list[tuple[str, bool]]:
    context, names, values = _map(draw, draw.choice((3, 5, 8)))
    parts = [(context, False)]
    for i in draw.shuffled(range(len(names))):
        parts += [(f" | {names[i]}", False), (values[i] + END, True)]
    return closed(parts)


def _notes(draw: Draw, high: int = 6) -> tuple[list[str], list[str]]:
    things = draw.sample(OBJECTS, draw.between(2, high))
    return things, [draw.choice(COLOURS) for _ in things]


def _note_text(things: list[str], colours: list[str]) -> str:
    return "Note: " + ", ".join(f"{t} {c}" for t, c in zip(things, colours, strict=True)) + "."


def notes(draw: Draw) -> Made:
    """'Note: lamp red, door blue.' and a question in other words."""
    things, colours = _notes(draw)
    text, i = _note_text(things, colours), draw.below(len(things))
    question = draw.choice(ASK_COLOUR).format(things[i])
    return Made((text[6:],), text + question, " " + colours[i], colours[i], {"length": len(things)})


def notes_dense(draw: Draw) -> list[tuple[str, bool]]:
    things, colours = _notes(draw, draw.choice((2, 4, 6)))
    parts = [(_note_text(things, colours), False)]
    for i in draw.shuffled(range(len(things))):
        parts += [(draw.choice(ASK_COLOUR).format(things[i]), False), (" " + colours[i] + END, True)]
    return closed(parts)


def _moves(draw: Draw, objects: int = 5, moves: int = 3) -> tuple[str, dict[str, str]]:
    things = draw.sample(OBJECTS, draw.between(2, objects))
    where = {t: draw.choice(BOXES) for t in things}
    text = ["Start: " + ", ".join(f"{t} {where[t]}" for t in things) + "."]
    for _ in range(draw.between(0, moves)):
        t = draw.choice(things)
        where[t] = draw.choice([b for b in BOXES if b != where[t]])
        text.append(f"Move {t} {where[t]}.")
    return " ".join(text), where


def boxes(draw: Draw) -> Made:
    """Objects in boxes, some of them moved: where is one of them at the end?"""
    text, where = _moves(draw)
    asked = draw.choice(list(where))
    question = draw.choice(ASK_PLACE).format(asked)
    return Made((text,), text + question, " " + where[asked], where[asked], {"moves": text.count("Move")})


def boxes_dense(draw: Draw) -> list[tuple[str, bool]]:
    text, where = _moves(draw, draw.choice((2, 3, 5)), draw.choice((1, 2, 3)))
    parts = [(text, False)]
    for asked in draw.shuffled(list(where)):
        parts += [(draw.choice(ASK_PLACE).format(asked), False), (" " + where[asked] + END, True)]
    return closed(parts)


SKILLS = (
    Skill("keys", "recall", keys, dense=keys_dense),
    Skill("notes", "recall", notes, dense=notes_dense),
    Skill("boxes", "tracking", boxes, known_by=NOT_SMALL, dense=boxes_dense),
)
