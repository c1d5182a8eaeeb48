from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from temperament.bases import worlds
from temperament.bases.worlds.draw import Draw
from temperament.bases.worlds.rows import wrong
from temperament.engine.encode import encode_all
from temperament.engine.examples import Completion, Example, Preference, Text
from temperament.engine.stream import Stream
from temperament.parts import part


@part("data.lab", modalities=("text",))
@dataclass(frozen=True)
class LabData:
    """Training items of the lab worlds, with ground truth: rows made by the world's generator, never its test items.

    Several skills are mixed evenly, row by row. `pairs: true` gives preferences: the right answer against a plausible wrong
    one.
    """

    skills: list[str]  # skills of the lab worlds
    rows: int = 500  # rows in all
    pairs: bool = False  # chosen/rejected instead of prompt/completion
    seed: int = 0  # which rows

    yields: ClassVar = ("Tokens", "Pairs")

    def __post_init__(self):
        for name in self.skills:
            worlds.skill(name)
        if not self.skills:
            raise ValueError("name at least one skill")

    def examples(self, ctx: Any) -> list[Example]:
        share = -(-self.rows // len(self.skills))
        columns = [self._of(worlds.skill(n), share) for n in self.skills]
        return [e for row in zip(*columns, strict=False) for e in row][: self.rows]

    def _of(self, skill: Any, n: int) -> list[Example]:
        items = skill.items("train", n, self.seed)
        if self.pairs:
            return [Preference(i.prompt, i.answer, wrong(i, items, Draw("wrong", i.id, self.seed), skill.check)) for i in items]
        return [self._example(skill, i) for i in items]

    def _example(self, skill: Any, item: Any) -> Example:
        meta = {"answer": item.answer, "item": item}
        if skill.metric == "nll":
            return Text(item.prompt + item.answer)
        return Completion(item.prompt, item.answer, meta=meta)

    def open(self, ctx: Any) -> Stream:
        encoded, _ = encode_all(self.examples(ctx), ctx.base.tokenizer)
        stream = Stream(encoded, ctx.batch, ctx.seed, name="lab")
        stream.yields = ("Pairs",) if self.pairs else ("Tokens",)
        return stream

    def suites(self) -> list[dict]:
        return [{"evaluate.lab": {"target": self.skills[0]}}]
