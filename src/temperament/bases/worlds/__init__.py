"""The lab worlds: small procedural worlds with ground truth, the same in every process and on every machine.

    skills()["reverse"].items("test", 200)      items that no base was trained on
    targets()                                   skills no base knows, for tuning
    near_and_far("shift")                       which known skills stand near a target, and which far

Pure Python: no torch, no numpy.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from ...errors import UserError, nearest
from . import arithmetic, chat, people, procedures, recall, text
from .rows import write_jsonl
from .skill import Item, Skill

# the known skills of the same prompt form or the same subject as a target; every other known skill is far from it
NEAR = {
    "shift": ("copy", "reverse", "sort", "rotate", "upper"),
    "swap": ("copy", "reverse", "sort", "rotate", "upper"),
    "interleave": ("copy", "reverse", "sort", "rotate", "upper", "stack"),
    "operator": ("add", "subtract", "add3"),
    "ticket": ("notes", "boxes", "stack"),
    "newcomers": ("people", "places", "strangers"),
}
MIDDLE = {
    "shift": ("count", "stack", "sort-long"),
    "swap": ("count", "stack", "sort-long"),
    "interleave": ("count", "sort-long", "keys"),
    "operator": ("compare", "add-steps", "multiply", "story", "workout"),
    "ticket": ("copy", "keys", "upper"),
    "newcomers": ("notes", "boxes"),
}
# how far a target lies from all that the bases know
TARGETS = {"shift": "near", "swap": "near", "interleave": "middle", "operator": "middle", "ticket": "far", "newcomers": "far"}


@cache
def _all() -> dict[str, Skill]:
    out = {}
    for module in (arithmetic, procedures, recall, people, chat, text):
        for skill in module.SKILLS:
            assert skill.name not in out, skill.name
            far = {
                t: "near" if skill.name in NEAR[t] else "middle" if skill.name in MIDDLE[t] else "far"
                for t in TARGETS
                if t != skill.name
            }
            out[skill.name] = replace(skill, distance_to=far)
    return out


def skills() -> dict[str, Skill]:
    """Every skill of the worlds by name, in a fixed order."""
    return dict(_all())


def skill(name: str) -> Skill:
    if name not in _all():
        raise UserError("skill", name, nearest(name, _all()))
    return _all()[name]


def known(base: str) -> list[str]:
    """The skills a base is meant to know (its name without '@version')."""
    return [s.name for s in _all().values() if base.split("@")[0] in s.known_by]


def targets() -> list[str]:
    """The skills no base knows, nearest first."""
    return list(TARGETS)


def half_known() -> list[str]:
    """Skills a base does some of the time: what RL with a verifier can raise."""
    return [s.name for s in _all().values() if s.role == "half"]


def near_and_far(target: str, base: str = "lm") -> tuple[list[str], list[str]]:
    """The skills `base` knows that are near a target (lost first), and all others (middle and far)."""
    if target not in TARGETS:
        raise UserError("target", target, nearest(target, TARGETS))
    names = known(base)
    near = [n for n in names if n in NEAR[target]]
    return near, [n for n in names if n not in near]


__all__ = ["Item", "Skill", "half_known", "known", "near_and_far", "skill", "skills", "targets", "write_jsonl"]
