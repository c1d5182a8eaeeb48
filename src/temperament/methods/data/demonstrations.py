from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from temperament.bases.worlds import control
from temperament.errors import UserError
from temperament.nn import draws
from temperament.nn.batch import Steps
from temperament.parts import part


@part("data.demonstrations", modalities=("control",))
@dataclass(frozen=True)
class Demonstrations:
    """Episodes shown by a program that can do the task, more or less: at each step what was seen and what it did next.

    A row is an episode of `Steps`: observations (T, seen), decisions (T, horizon * actions) the demonstrator's next actions,
    as many as a plan of the base holds. It sees the slot with an error of spread `aim`, one an episode, and its hand
    trembles by `shake`; both 0 is an expert (of the narrow slot he still misses two in ten: the peg slips)."""

    task: str  # which task of the base's world
    episodes: int = 200  # demonstrations
    aim: float = 0.06  # spread of the error with which it sees the slot
    shake: float = 0.3  # spread of its hand's trembling, in normalised actions
    first: int = 1_000_000  # number of the first episode; those from 0 taught the lab's policy

    yields: ClassVar = ("Steps",)

    def __post_init__(self):
        if self.episodes < 1 or min(self.aim, self.shake) < 0:
            raise ValueError("episodes is at least 1; aim and shake are not negative")

    def open(self, ctx: Any) -> Stream:
        config = getattr(ctx.base.model, "config", None)
        if not hasattr(config, "world"):
            raise UserError("data.demonstrations", ctx.base.id, "this base acts in no world; use a policy, e.g. lab/policy")
        return Stream(self, ctx, config)

    def suites(self) -> list[dict]:
        return [{"evaluate.control": {"target": self.task}}]


class Stream:
    def __init__(self, spec: Demonstrations, ctx: Any, config: Any):
        who = spec.first + torch.arange(spec.episodes)
        seen, plans, weight = control.demonstrated(config.world, spec.task, who, 0, config.horizon, spec.aim, spec.shake)
        self.whole, self.ctx = Steps(seen, plans, weight), ctx
        self.steps_per_epoch = max(-(-spec.episodes // ctx.batch), 1)

    def batch(self, step: int, progress: Any = None) -> Steps:
        epoch, i = divmod(step, self.steps_per_epoch)
        order = draws.permutation(len(self.whole), self.ctx.seed, "demonstrations", epoch)
        return self.whole.select(order[i * self.ctx.batch : (i + 1) * self.ctx.batch])
