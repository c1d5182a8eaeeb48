from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from temperament.bases.worlds import control
from temperament.engine.episodes import play
from temperament.errors import UserError
from temperament.nn.batch import Rollout, Steps
from temperament.parts import part


@part("rollout.episodes", papers=["269"], modalities=("control",))
@dataclass(frozen=True)
class Episodes:
    """Episodes of a policy in its world, played as it stands: what PPO, GRPO and a critic train on where there are no words.

    Each step plays `batch` episodes at once, from starts never seen before. What is sampled is a decision, at every step the
    correction of the planned action (`explore: step`, adapters.residual_policy: the base plans, and only what corrects it is
    trained), or every plan as a whole (`explore: plan`: a Gaussian around the policy's own chunks). Rewards come with the
    steps they were earned in; after an episode's end nothing carries weight. Starts, slips and samples are addressed by
    (seed, step, episode): resuming plays the same episodes, and every process plays all of them. Source: paper 269."""

    task: str  # which task of the base's world
    explore: Literal["step", "plan"] = "step"  # what is sampled: corrections of each step, or plans
    group: int = 1  # episodes from one start, for objectives that compare them

    yields: ClassVar = ("Rollout",)
    generates: ClassVar = True

    def __post_init__(self):
        if self.group < 1:
            raise ValueError("group must be at least 1")

    def open(self, ctx: Any) -> Stream:
        if ctx.batch % self.group:
            raise UserError(
                "train.batch",
                ctx.batch,
                f"it must be a multiple of the group ({self.group}), e.g. {self.group * max(ctx.batch // self.group, 1)}",
            )
        return Stream(self, ctx)

    def suites(self) -> list[dict]:
        return [{"evaluate.control": {"target": self.task}}]


class Stream:
    def __init__(self, spec: Episodes, ctx: Any):
        self.spec, self.ctx, self.config = spec, ctx, world_of(ctx.base, "rollout.episodes")
        control.make(self.config.world, spec.task, torch.arange(1))  # a task it does not have is refused now
        self.told: dict[str, float] = {}

    def batch(self, step: int, progress: Any = None) -> Rollout:
        spec, ctx = self.spec, self.ctx
        episodes = torch.arange(ctx.batch)
        world = control.make(self.config.world, spec.task, episodes // spec.group, ctx.seed, "train", step + 1)
        view = ctx.live.view("live") if ctx.live is not None else ctx.base.model
        got = play(view, world, spec.explore, (ctx.seed, step), episodes)
        self.told = {"success": float(got.success.mean()), "length": float(got.length.mean())}
        return Rollout(got.steps, got.behaviour, got.rewards, episodes // spec.group)

    def largest(self) -> Rollout:
        """An episode that lasts to the end, in every row."""
        config, n = self.config, self.ctx.batch
        limit = control.WORLDS[config.world].limit
        times, wide = (
            (limit, config.actions)
            if self.spec.explore == "step"
            else (-(-limit // config.execute), config.execute * config.actions)
        )
        along = lambda *more: torch.zeros(n, times, *more)
        steps = Steps(
            along(config.observations), along(wide), along() + 1, along(config.actions) if self.spec.explore == "step" else None
        )
        return Rollout(steps, along(), along(), torch.arange(n) // self.spec.group)

    def feedback(self, batches: list, row: dict) -> dict[str, float]:
        return self.told


def world_of(base: Any, field: str) -> Any:
    """The configuration of a policy. Raises UserError where the base is none."""
    config = getattr(base.model, "config", None)
    if not hasattr(config, "world"):
        raise UserError(field, base.id, "this base acts in no world; use a policy, e.g. lab/policy")
    return config
