from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from temperament.nn.batch import Tokens
from temperament.nn.logprobs import kl, label, score
from temperament.parts import part
from temperament.protocols import Term, Terms


@part("objectives.sft.asft", papers=["031"], modalities=("text",))
@dataclass(frozen=True)
class ASFT:
    """Anchored supervised fine-tuning: DFT's token weights, held to the model the step began with.

        loss = sum_t w_t ( - sg(p_t) log p_t  +  beta KL_t ) / sum_t w_t
        KL_t = KL(p_0 || p) (forward: all that p_0 could say stays covered) or KL(p || p_0) (reverse), whole vocabulary, nats

    p_t = p(x_t | x_<t). p_0 is a version of the same model, by default `start`: no second model. beta = 0 is DFT, and scores no
    p_0. One forward of each model gives both terms. Source: Anchored Supervised Fine-Tuning (paper 031); the direction is that
    of its code.
    """

    batch: ClassVar = ("Tokens",)
    beta: float = 0.1  # weight of the divergence; may be a schedule
    direction: Literal["forward", "reverse"] = "forward"  # which way it is taken
    reference: str = "start"  # version the model is held to: start, base, ema
    per: Literal["token", "example"] = "token"  # "token": long answers count more; "example": each example counts once

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.reference,)

    def prepare(self, whole: Tokens, views) -> Tokens:
        return whole if self.per == "token" else whole.per_example()

    def counts(self, whole: Tokens) -> dict[str, float]:
        return dict.fromkeys(("dft", "nll", *(["kl"] if self.beta else [])), whole.trained)

    def loss(self, micro: Tokens, views) -> Terms:
        w, n = micro.weights, micro.trained
        anchor = [kl(views.view(self.reference), direction=self.direction)] if self.beta else []
        got = score(views.model, micro, label(), *anchor)
        logp = got["label"]
        terms = {"dft": Term(-logp.detach().exp() * logp * w, n), "nll": Term(-logp.detach() * w, n, weight=0)}
        return terms | ({"kl": Term(got["kl"] * w, n, weight=self.beta)} if self.beta else {})
