from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from temperament.nn.batch import Steps
from temperament.parts import part
from temperament.protocols import Term, Terms


@part("objectives.sft.behaviour_cloning", modalities=("control",))
@dataclass(frozen=True)
class BehaviourCloning:
    """Do as was done: the square of what a policy would decide less what a demonstrator did.

        loss = 1/2 sum over steps of | mean(o_t) - d_t |^2 / count     count: steps shown; d_t (k,), summed over its entries

    It is the negative log-prob of the demonstrations under a Gaussian of spread 1, constants apart; the policy's own spread
    gets no gradient."""

    batch: ClassVar = ("Steps",)

    def counts(self, whole: Steps) -> dict[str, float]:
        return {"distance": whole.trained}

    def loss(self, micro: Steps, views) -> Terms:
        mean = views.model(micro.observations, micro.planned).mean[..., : micro.decisions.shape[-1]]
        return {"distance": Term((mean - micro.decisions).square().sum(-1) / 2 * micro.weights, micro.trained)}
