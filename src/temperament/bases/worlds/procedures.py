"""Procedures over letters: what is known, and new ones of the same form.

Splits are by sequence of letters within a procedure (a held-out sequence of `reverse` may be a training sequence of `sort`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .draw import Draw
from .skill import Made, Skill, last_number

COLOURS = ("red", "blue", "green", "black", "white", "brown", "pink", "gold")
OBJECTS = ("lamp", "door", "cup", "key", "hat", "book", "coat", "box", "ball", "chair", "bell", "ring")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def spaced(letters: Sequence[str]) -> str:
    return "".join(" " + x for x in letters)


def on_letters(
    phrasings: Sequence[str], work: Callable[[list[str]], Sequence[str]], low: int = 2, high: int = 8, words: bool = False
) -> Callable[[Draw], Made]:
    """A generator of items `phrasing(letters) -> work(letters)`; the first phrasing is asked half of the time.

    With `words`, one item in three is over words instead of letters. They are there for retrieval too: a word that is only ever
    looked up by has an embedding like all its fellows, and cannot be looked up by.
    """

    def make(draw: Draw) -> Made:
        # short sequences are few: lengths are drawn in favour of the longer ones
        size = max(draw.between(low, high), draw.between(low, high))
        pool = (*OBJECTS, *COLOURS) if words and draw.chance(0.35) else LETTERS
        letters = [draw.choice(pool) for _ in range(size)]
        phrasing = phrasings[0] if draw.chance(0.5) else draw.choice(phrasings)
        answer = spaced(work(letters))
        return Made(tuple(letters), phrasing.format(spaced(letters)), answer, answer.strip(), {"length": size})

    return make


def shift(letters: Sequence[str], by: int = 1) -> list[str]:
    return [LETTERS[(LETTERS.index(x) + by) % 26] for x in letters]


def count(draw: Draw) -> Made:
    """Counted aloud, letter by letter: 'count x: a x a x =' -> ' a0 x1 a1 x2'."""
    few = draw.sample(LETTERS, 3)
    letters = [draw.choice(few) for _ in range(draw.between(3, 7))]
    asked = draw.choice(few)
    prompt = draw.choice((f"count {asked}:{spaced(letters)} =", f"Q: How many {asked} in{spaced(letters)}?\nA:"))
    answer = "".join(f" {x}{letters[: i + 1].count(asked)}" for i, x in enumerate(letters))
    return Made((asked, *letters), prompt, answer, letters.count(asked), {"length": len(letters)})


def stack(draw: Draw) -> Made:
    """push x puts a letter on the stack, pop takes the last one off; answered with the stack, bottom first, or 'empty'."""
    held: list[str] = []
    words: list[str] = []
    for i in range(draw.between(3, 8)):
        if held and i and draw.chance(0.35):
            held.pop()
            words.append("pop")
        else:
            held.append(draw.choice(LETTERS))
            words.append(f"push {held[-1]}")
    answer = spaced(held) or " empty"
    return Made(tuple(words), f"stack: {' '.join(words)} =", answer, answer.strip(), {"length": len(words)})


def interleave(draw: Draw) -> Made:
    size = draw.between(2, 5)
    left, right = [[draw.choice(LETTERS) for _ in range(size)] for _ in range(2)]
    answer = spaced([x for pair in zip(left, right, strict=True) for x in pair])
    return Made((*left, *right), f"interleave:{spaced(left)} |{spaced(right)} =", answer, answer.strip(), {"length": size})


def pack(draw: Draw) -> Made:
    """A new output format (target, far): 'ticket: 7 red lamp' -> '<7|lamp|red>'."""
    n, colour, thing = draw.between(2, 99), draw.choice(COLOURS), draw.choice(OBJECTS)
    return Made((n, colour, thing), f"ticket: {n} {colour} {thing} =", f" <{n}|{thing}|{colour}>")


def _known(name: str, work: Callable, *phrasings: str, **more) -> Skill:
    return Skill(name, "procedure", on_letters((f"{name}:{{}} =", *phrasings), work, **more))


def _target(name: str, work: Callable, **more) -> Skill:
    return Skill(name, "procedure", on_letters((f"{name}:{{}} =",), work, **more), role="target", known_by=())


SKILLS = (
    _known("copy", list, "Write{} again:", "Q: What stands in{}?\nA:", words=True),
    _known("reverse", lambda x: x[::-1], "Write{} backwards:", "Q: What is{} in reverse order?\nA:", words=True),
    _known("sort", sorted, "Put{} in order:", "Q: What is{} in alphabetical order?\nA:"),
    _known("rotate", lambda x: [*x[1:], x[0]], "Move the first of{} to the end:", words=True),
    _known("upper", lambda x: [y.upper() for y in x], "Write{} in capitals:"),
    Skill("count", "procedure", count, verdict=last_number),
    Skill("stack", "procedure", stack),
    Skill(
        "sort-long",
        "procedure",
        on_letters(("sort:{} =", "Put{} in order:"), sorted, low=13, high=15),
        role="half",
        known_by=(),
        noisy=on_letters(("sort:{} =", "Put{} in order:"), sorted, low=10, high=12),  # bases met shorter ones only
    ),
    _target("shift", shift, low=3),
    _target("swap", lambda x: [x[-1], *x[1:-1], x[0]], low=3),
    Skill("interleave", "procedure", interleave, role="target", known_by=()),
    Skill("ticket", "format", pack, role="target", known_by=()),
)
