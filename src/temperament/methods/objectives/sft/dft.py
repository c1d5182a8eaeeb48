from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from temperament.nn.batch import Tokens
from temperament.nn.logprobs import label, score
from temperament.parts import part
from temperament.protocols import Term, Terms


@part("objectives.sft.dft", papers=["031"], modalities=("text",))
@dataclass(frozen=True)
class DFT:
    """Dynamic fine-tuning: each token's loss weighed by the probability the model gives it, no gradient through the weight.

        loss = - sum_t w_t sg(p_t) log p_t / sum_t w_t        p_t = p(x_t | x_<t)
        gradient = - sum_t w_t grad p_t / sum_t w_t

    A token the model finds absurd teaches little, one it half believes teaches most: reward-weighted regression with reward 1
    on the demonstration. It sharpens without an anchor; `objectives.sft.asft` adds one. `nll` is recorded, not trained.
    Source: Wu et al. 2025 (On the Generalization of SFT); Anchored Supervised Fine-Tuning (paper 031).
    """

    batch: ClassVar = ("Tokens",)
    per: Literal["token", "example"] = "token"  # "token": long answers count more; "example": each example counts once

    def prepare(self, whole: Tokens, views) -> Tokens:
        return whole if self.per == "token" else whole.per_example()

    def counts(self, whole: Tokens) -> dict[str, float]:
        return {"dft": whole.trained, "nll": whole.trained}

    def loss(self, micro: Tokens, views) -> Terms:
        logp = score(views.model, micro, label())["label"]
        return {
            "dft": Term(-logp.detach().exp() * logp * micro.weights, micro.trained),
            "nll": Term(-logp.detach() * micro.weights, micro.trained, weight=0),
        }
