from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from temperament.engine import see
from temperament.engine.pictures import Picture, Stream
from temperament.errors import UserError, nearest
from temperament.nn import draws
from temperament.parts import part, plain
from temperament.protocols import Pictured


@part("data.few_shot", papers=["013"], modalities=("image",))
@dataclass(frozen=True)
class FewShot:
    """A few labelled pictures of each of some classes of another source: what is tuned on, and what its other classes lose.

    The classes are numbered anew, in the order in which they are named. Each brings `shots` training pictures, drawn by the
    part's own seed; what is measured are the pictures of these classes that the source keeps out of training, each asked for
    its class alone. Of the classes left out another one is made, for a suite.
    """

    of: Pictured  # the source of pictures
    only: list[str] = field(default_factory=list)  # names of the classes; empty: all
    shots: int = 16  # training pictures of each
    seed: int = 0  # which of them

    yields: ClassVar = ("Images",)

    def __post_init__(self):
        if self.shots < 1:
            raise ValueError("shots must be at least 1")
        if len(self.only) == 1 or len(set(self.only)) < len(self.only):
            raise ValueError("only must name two or more different classes")

    @property
    def called(self) -> str:
        return f"{self.of.called}: {', '.join(self.only)}" if self.only else self.of.called

    def classes(self, base: Any = None) -> list[str]:
        known = list(self.of.classes(base))
        for name in self.only:
            if name not in known:
                raise UserError("data.few_shot.only", name, f"the source has no such class; {nearest(name, known)}")
        return list(self.only) or known

    def held(self, base: Any = None) -> list[Picture]:
        return self._mine(self.of.held(base), base)

    def open(self, ctx: Any) -> Stream:
        classes = self.classes(ctx.base)
        see.must_know(ctx, classes, "data.few_shot")
        rows = self._mine(self.of.open(replace(ctx, live=None)).pictures, ctx.base)
        chosen: list[Picture] = []
        for k, name in enumerate(classes):
            own = [p for p in rows if p.label == k]
            if len(own) < self.shots:
                mend = f"the source has {len(own)} training pictures of {name!r}; ask for fewer, or give it more rows"
                raise UserError("data.few_shot.shots", self.shots, mend)
            order = draws.permutation(len(own), self.seed, f"few_shot/{name}").tolist()
            chosen += [own[i] for i in order[: self.shots]]
        return Stream(chosen, ctx, "few_shot")

    def suites(self) -> list[dict]:
        return [{"evaluate.pictures": {"of": plain(self)}}]

    def _mine(self, pictures: Sequence[Picture], base: Any) -> list[Picture]:
        known = list(self.of.classes(base))
        number = {known.index(name): k for k, name in enumerate(self.classes(base))}
        return [replace(p, label=number[p.label], alternatives=()) for p in pictures if p.label in number]
