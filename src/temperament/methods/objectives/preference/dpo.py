from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from temperament.nn.batch import Pairs
from temperament.nn.logprobs import response
from temperament.parts import number, part
from temperament.protocols import Term, Terms


@part("objectives.preference.dpo", modalities=("text",))
@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation.

        loss = - log sigmoid( beta * ((pi_w - ref_w) - (pi_l - ref_l)) )       mean over pairs; with label smoothing e:
               - (1 - e) log sigmoid(m) - e log sigmoid(-m)

    pi, ref: log-probs of the whole response (nats) under the policy and the reference; w the chosen, l the rejected one. The
    reference is a *version* of the same model - by default `start`, the model as this step began (after SFT: the SFT model)
    - scored once a batch, not a second model. Where the source gives each pair a doubt of its own (`Pairs.doubt`), that is
    its e. Source: Rafailov et al. 2023."""

    batch: ClassVar = ("Pairs",)
    beta: float = 0.1  # strength of the anchor to the reference; small moves further away
    label_smoothing: float = 0.0  # probability that a preference is the wrong way round
    reference: str = "start"  # version the policy is held to: start, base, ema, best

    def __post_init__(self):
        if number(self.beta, 1.0) <= 0:
            raise ValueError("beta must be above 0")
        if not 0 <= number(self.label_smoothing, 0.0) < 0.5:
            raise ValueError("label_smoothing must lie in [0, 0.5): from there on pairs would be learnt the wrong way round")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.reference,)

    def prepare(self, whole: Pairs, views) -> Pairs:
        whole.ref_chosen = views.precompute(self.reference, whole, lambda m, p: response(m, p.chosen))
        whole.ref_rejected = views.precompute(self.reference, whole, lambda m, p: response(m, p.rejected))
        return whole

    def counts(self, whole: Pairs) -> dict[str, float]:
        return {"dpo": len(whole), "margin": len(whole), "accuracy": len(whole)}

    def loss(self, micro: Pairs, views) -> Terms:
        chosen = response(views.model, micro.chosen) - micro.ref_chosen
        rejected = response(views.model, micro.rejected) - micro.ref_rejected
        margin, n = self.beta * (chosen - rejected), len(micro)
        e = self.label_smoothing if micro.doubt is None else micro.doubt
        nll = -(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin)
        return {
            "dpo": Term(nll, n),
            "margin": Term(margin.detach(), n, weight=0),
            "accuracy": Term((margin > 0).float(), n, weight=0),
        }
