from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from temperament.errors import UserError
from temperament.nn.batch import Rollout
from temperament.parts import part
from temperament.protocols import Term, Terms


@part("objectives.policy.value", papers=["213"], modalities=("text", "control"))
@dataclass(frozen=True)
class Value:
    """A critic's regression: what it says of each state against what came after, not further from what it said before than
    `clip`.

        loss = 1/2 sum_t max( (V - returns_t)^2, (V_old + clamp(V - V_old, -c, c) - returns_t)^2 ) / count    count: tokens

    For a player with a value head whose turn comes after that of the policy: `returns` and V_old are what
    objectives.policy.ppo left in the batch. Source: Schulman et al. 2017; paper 213."""

    batch: ClassVar = ("Rollout",)
    clip: float | None = 0.2  # c; null: unclipped
    epochs: int = 2  # passes over a rollout
    head: str = "value"  # which head of this player

    def __post_init__(self):
        if self.epochs < 1:
            raise ValueError("epochs must be at least 1")

    def prepare(self, whole: Rollout, views) -> Rollout:
        if whole.returns is None:
            raise UserError(
                "objectives.policy.value",
                "no returns",
                "the objective of the policy must leave them: use objectives.policy.ppo there",
            )
        return whole

    def updates(self, whole: Rollout, views) -> list[Rollout]:
        return [whole] * self.epochs

    def counts(self, whole: Rollout) -> dict[str, float]:
        return dict.fromkeys(("value", "surprise"), whole.tokens.trained)

    def loss(self, micro: Rollout, views) -> Terms:
        w, n = micro.tokens.weights, micro.tokens.trained
        value = views.head(self.head)(micro.tokens.states(views.model).float())[..., 0]
        error = (value - micro.returns).square()
        if self.clip is not None:
            near = micro.values + (value - micro.values).clamp(-self.clip, self.clip)
            error = torch.maximum(error, (near - micro.returns).square())
        off = (micro.values - micro.returns).square()
        return {"value": Term(error / 2 * w, n), "surprise": Term(off / 2 * w, n, weight=0)}
