from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from temperament.bases import worlds
from temperament.engine.measure import Question, TextSkill
from temperament.parts import part


@part("evaluate.lab", modalities=("text",))
@dataclass(frozen=True)
class Lab:
    """Skills of the lab worlds: held-out items with ground truth, checked by the worlds' oracles.

    With a `target` the retained skills are those the base is meant to know, each marked near, middle or far from it.
    """

    target: str | None = None  # the skill that is being taught
    retained: list[str] = field(default_factory=list)  # retained skills; empty: all that the base is meant to know
    items: int | None = None  # items a skill; default: evaluation.items
    seed: int = 0  # which held-out items
    max_new: int | None = None  # tokens an answer may have; null: those of the longest right one, and four

    def __post_init__(self):
        if self.max_new is not None and self.max_new < 1:
            raise ValueError("max_new must be at least 1")
        for name in [*self.retained, *([self.target] if self.target else [])]:
            worlds.skill(name)

    def skills(self, ctx: Any) -> list[TextSkill]:
        known = self.retained or worlds.known(ctx.base.id.removeprefix("lab/"))
        wanted = [self.target] if self.target else []
        wanted += [n for n in known if n != self.target]
        return [self._skill(worlds.skill(name), ctx) for name in wanted]

    def _skill(self, skill: worlds.Skill, ctx: Any) -> TextSkill:
        items = skill.items("test", self.items or ctx.items, self.seed)
        exact = skill.metric == "exact"
        questions = tuple(
            Question(i.id, i.prompt, i.answer, lambda output, i=i: float(skill.check(i, output)) if exact else 0.0)
            for i in items
        )
        room = self.max_new or 4 + max(len(ctx.base.tokenizer(i.answer)["input_ids"]) for i in items)
        role = "target" if skill.name == self.target else "retained"
        return TextSkill(skill.name, questions, role, skill.metric, room, skill.distance_to.get(self.target or ""))
