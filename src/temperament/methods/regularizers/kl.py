from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from temperament.errors import UserError
from temperament.nn.batch import Batch, Tokens
from temperament.nn.logprobs import kl, score
from temperament.parts import part
from temperament.protocols import Term, Terms


@part("regularizers.kl", modalities=("text",))
@dataclass(frozen=True)
class KL:
    """Stay near a version of the model, token by token, on the batch's own trained tokens.

        forward:  weight * mean_t  sum_v  ref(v) (log ref(v) - log pi(v))        the version's mass must stay covered
        reverse:  weight * mean_t  sum_v  pi(v)  (log pi(v) - log ref(v))        pi must not leave the version's mass

    Full vocabulary, streamed; nats per token. The version is `base` by default: what is kept is what the model knew.
    """

    per: ClassVar = "batch"
    weight: float = 0.1  # factor of the term; may be a schedule
    version: str = "base"  # which version to stay near: base, start, ema, best
    direction: Literal["forward", "reverse"] = "reverse"  # which way the divergence is taken

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.version,)

    def counts(self, whole: Batch) -> dict[str, float]:
        if not (found := _tokens(whole)):
            mend = "it compares what is said of words; use a source of text, or a regularizer of the batch's own kind"
            raise UserError("regularizers.kl", type(whole).__name__, mend)
        return {"kl": sum(t.trained for t in found)}

    def loss(self, micro: Batch, views) -> Terms:
        total, count = 0.0, 0.0
        for tokens in _tokens(micro):
            value = score(views.model, tokens, kl(views.view(self.version), direction=self.direction))["kl"]
            total, count = total + (value * tokens.weights).sum(), count + tokens.trained
        return {"kl": Term(total, count, weight=self.weight)}


def _tokens(batch: Batch) -> list[Tokens]:
    return [batch] if isinstance(batch, Tokens) else [v for v in vars(batch).values() if isinstance(v, Tokens)]
