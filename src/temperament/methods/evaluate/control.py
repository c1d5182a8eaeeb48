from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from temperament.bases.worlds import control
from temperament.engine.episodes import play
from temperament.engine.measure import System, content_key
from temperament.errors import UserError
from temperament.parts import part
from temperament.protocols import Outcome


@dataclass(frozen=True)
class ControlSkill:
    """Episodes from held-out starts, acted on the mean: 1 where the task was done in time."""

    world: str
    name: str
    items: int
    seed: int = 0
    role: str = "retained"
    metric: str = "success"
    distance: str | None = None
    how = {}

    def key(self) -> str:
        return content_key("control", self.world, self.name, self.items, self.seed)

    def some(self, n: int) -> ControlSkill:
        return ControlSkill(self.world, self.name, min(n, self.items), self.seed, self.role, self.metric, self.distance)

    def measure(self, system: System) -> list[Outcome]:
        world = control.make(self.world, self.name, torch.arange(self.items), self.seed, "test")
        world.reset()
        starts = [start for start, _ in world.words()]
        got = play(system.subject, world)
        rows = zip(starts, world.words(), got.success.tolist(), got.length.tolist(), strict=True)
        return [
            Outcome(f"{self.name}/{i}", self.name, start, "done", f"{end} after {int(t)} steps", s)
            for i, (start, (_, end), s, t) in enumerate(rows)
        ]


@part("evaluate.control", modalities=("control",))
@dataclass(frozen=True)
class Control:
    """Success rates of a policy in its world, from starts and with slips that no training sees; the same before and after.

    With a `target` the other tasks of the world are what is to be retained.
    """

    target: str | None = None  # the task that is being taught
    retained: list[str] = field(default_factory=list)  # tasks to retain; empty: all others
    items: int | None = None  # episodes a task; default: evaluation.items
    seed: int = 0  # which starts

    def skills(self, ctx: Any) -> list[ControlSkill]:
        config = getattr(ctx.base.model, "config", None)
        if not hasattr(config, "world"):
            raise UserError("evaluate.control", ctx.base.id, "this base acts in no world; use a policy, e.g. lab/policy")
        make = control.WORLDS[config.world]
        names = [*([self.target] if self.target else []), *(n for n in self.retained or make.tasks if n != self.target)]
        for name in names:
            control.make(config.world, name, torch.arange(1))
        return [self._skill(config.world, n, make, ctx) for n in names]

    def _skill(self, world: str, name: str, make: Any, ctx: Any) -> ControlSkill:
        role = "target" if name == self.target else "retained"
        far = make.distance.get(name) if self.target == "insert" and role == "retained" else None
        return ControlSkill(world, name, self.items or ctx.items, self.seed, role, distance=far)
