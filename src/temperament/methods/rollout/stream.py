from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from temperament.engine import record, see
from temperament.engine.pictures import Picture, images, size_of
from temperament.errors import UserError
from temperament.nn.batch import Images
from temperament.parts import part, plain
from temperament.protocols import Pictured, Source


@part("rollout.test_stream", papers=["200"], modalities=("image",), declares=["adapts at test time"])
@dataclass(frozen=True)
class Visits:
    """Unlabelled pictures of one domain after another, each seen once: predict, record, adapt.

        said_t = log softmax( sum over versions v of f_v(x_t) )        of the model as it is before the step learns from x_t

    A step's batch is of one domain, in a fixed order, without its labels; what the model says of it, by the sum of the logits
    of `versions`, is recorded before the update and is what evaluate.prequential measures: the pictures it adapts to are those
    it is asked about, so this is a figure of a model that adapts at test time and no other. With `replay` each step also
    brings labelled pictures of a source, as a batch of its own. Source: Wang et al. 2022; paper 200.
    """

    domains: list[Pictured]  # visited in this order; of each, the pictures it keeps out of training
    rows: int = 256  # pictures of a visit, at most
    repeats: int = 1  # times that all domains are visited in turn
    versions: list[str] = field(default_factory=lambda: ["live", "ema"])  # whose logits are added up
    replay: Source | None = None  # labelled pictures, a batch of each step; null: none
    head: str | None = None  # the head that is asked; null: the newest that was added, else the base's own

    yields: ClassVar = ("Images",)

    def __post_init__(self):
        if self.rows < 1 or self.repeats < 1:
            raise ValueError("rows and repeats must be at least 1")
        if not self.domains or not self.versions:
            raise ValueError("domains and versions must name at least one each")

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(v for v in self.versions if v != "live")

    def classes(self, base: Any) -> list[str]:
        first, *others = [list(d.classes(base)) for d in self.domains]
        if any(o != first for o in others):
            raise UserError("rollout.test_stream.domains", len(self.domains), "all must be of the same classes, in one order")
        return first

    def visits(self, base: Any) -> list[tuple[str, list[Picture]]]:
        """What is met, in order: name of the domain, its pictures."""
        met = [(d.called, d.held(base)[: self.rows]) for d in self.domains]
        for name, pictures in met:
            if not pictures:
                raise UserError("rollout.test_stream.domains", name, "it holds no pictures out of training")
        return met * self.repeats

    def open(self, ctx: Any) -> Stream:
        return Stream(self, ctx)

    def suites(self) -> list[dict]:
        return [{"evaluate.prequential": {"of": plain(self)}}]


class Stream:
    """said: what was said of the pictures met so far, in their order, NaN where none was."""

    def __init__(self, spec: Visits, ctx: Any):
        classes = spec.classes(ctx.base)
        see.must_know(ctx, classes, "rollout.test_stream")
        self.spec, self.ctx, self.size = spec, ctx, size_of(ctx.base)
        self.replay = spec.replay.open(ctx) if spec.replay is not None else None
        self.visits = spec.visits(ctx.base)
        self.steps: list[tuple[int, int, int]] = []  # (visit, first of its pictures, number of that picture in the stream)
        met = 0
        for k, (_, pictures) in enumerate(self.visits):
            self.steps += [(k, i, met + i) for i in range(0, len(pictures), ctx.batch)]
            met += len(pictures)
        self.steps_per_epoch = len(self.steps)
        self.said = torch.full((met, len(classes)), torch.nan)

    def batch(self, step: int, progress: Any = None) -> list[Images]:
        if step >= len(self.steps):
            mend = f"its pictures are met once, in {len(self.steps)} steps of {self.ctx.batch}; set epochs to 1, or repeats"
            raise UserError("train.steps", step + 1, mend)
        rows, first = self.met(step), self.steps[step][2]
        self.said[first : first + len(rows)] = self.predicted(rows)
        return [rows, *([self.replay.batch(step, progress)] if self.replay is not None else [])]

    def met(self, step: int) -> Images:
        visit, start, first = self.steps[step]
        some = self.visits[visit][1][start : start + self.ctx.batch]
        rows = images([(first + i, p) for i, p in enumerate(some)], self.size)
        rows.labels.fill_(-1)  # what they are is nobody's to learn from
        rows.captions = None
        return rows

    def predicted(self, rows: Images) -> Tensor:
        """(rows, classes) log-probs, nats."""
        base, views = self.ctx.base, self.ctx.views
        known = ("live", "base", "start", *views.live.versions)
        asked = [v for v in self.spec.versions if v in known] or ["live"]  # (a part that only looks holds no mean)

        def say(model: Any, some: Images) -> Tensor:
            return see.logits(model, base, some.pixels, self.spec.head or see.newest(model))

        return sum(views.precompute(v, rows, say) for v in asked).log_softmax(-1)

    def feedback(self, batches: list, row: dict) -> dict[str, Any]:
        visit, start, first = self.steps[row["step"] - 1]
        name, pictures = self.visits[visit]
        if self.ctx.folder is not None and self.ctx.world.main:
            record.keep(self.ctx.folder, self.ctx.key, {"said": self.said})
        n = len(batches[0])
        truth = torch.tensor([p.label for p in pictures[start : start + n]])
        right = (self.said[first : first + n].argmax(1) == truth).float().mean()
        return {"domain": name, "terms": row.get("terms", {}) | {"online accuracy": float(right)}}

    def largest(self) -> list[Images] | Images:
        return self.met(0)

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": {"said": self.said}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.said = state["tensors"]["said"].clone()
