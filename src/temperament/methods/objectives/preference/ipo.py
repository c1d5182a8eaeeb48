from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from temperament.nn.batch import Pairs
from temperament.nn.logprobs import response
from temperament.parts import number, part
from temperament.protocols import Term, Terms


@part("objectives.preference.ipo", modalities=("text",))
@dataclass(frozen=True)
class IPO:
    """Identity preference optimisation: the margin is drawn to a finite value, so that no preference runs away.

        loss = ( (pi_w - ref_w)/n_w - (pi_l - ref_l)/n_l - 1 / (2 beta) )^2         mean over pairs

    pi, ref: log-probs of the responses (nats) under the policy and the reference version; n: their trained tokens, so that long
    answers are not preferred for their length. Source: Azar et al. 2023.
    """

    batch: ClassVar = ("Pairs",)
    beta: float = 0.1  # the margin aimed at is 1 / (2 beta) nats a token
    reference: str = "start"  # version the policy is held to: start, base, ema, best

    def __post_init__(self):
        if number(self.beta, 1.0) <= 0:
            raise ValueError("beta must be above 0")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.reference,)

    def prepare(self, whole: Pairs, views) -> Pairs:
        whole.ref_chosen = views.precompute(self.reference, whole, lambda m, p: response(m, p.chosen))
        whole.ref_rejected = views.precompute(self.reference, whole, lambda m, p: response(m, p.rejected))
        return whole

    def counts(self, whole: Pairs) -> dict[str, float]:
        return {"ipo": len(whole), "margin": len(whole)}

    def loss(self, micro: Pairs, views) -> Terms:
        chosen = (response(views.model, micro.chosen) - micro.ref_chosen) / micro.chosen.weights.sum(1)
        rejected = (response(views.model, micro.rejected) - micro.ref_rejected) / micro.rejected.weights.sum(1)
        margin = chosen - rejected
        return {
            "ipo": Term((margin - 1 / (2 * self.beta)) ** 2, len(micro)),
            "margin": Term(margin.detach(), len(micro), weight=0),
        }
