from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from temperament.nn.batch import Tokens
from temperament.nn.logprobs import label, score
from temperament.parts import part
from temperament.protocols import Term, Terms


@part("objectives.sft.cross_entropy", modalities=("text",))
@dataclass(frozen=True)
class CrossEntropy:
    """Supervised fine-tuning: the negative log-likelihood of the trained tokens.

        loss = - sum_t w_t log p(x_t | x_<t) / sum_t w_t         over the whole effective batch, w_t the token weights

    Nats per trained token. With `per: example` every example counts the same whatever its length.
    """

    batch: ClassVar = ("Tokens",)
    per: str = "token"  # "token": long answers count more; "example": each example counts once

    def __post_init__(self):
        if self.per not in ("token", "example"):
            raise ValueError("per is 'token' or 'example'")

    def prepare(self, whole: Tokens, views) -> Tokens:
        if self.per == "token":
            return whole
        return whole.per_example()

    def counts(self, whole: Tokens) -> dict[str, float]:
        return {"nll": whole.trained}

    def loss(self, micro: Tokens, views) -> Terms:
        return {"nll": Term(-score(views.model, micro, label())["label"] * micro.weights, micro.trained)}
