from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from temperament.engine import see
from temperament.nn.batch import Images
from temperament.parts import part
from temperament.protocols import Term, Terms


@part("objectives.robust.entropy_min", modalities=("image",), declares=["adapts at test time"])
@dataclass(frozen=True)
class EntropyMin:
    """Be sure of what you see: the entropy of the answers on unlabelled pictures is driven down.

        loss = - sum_c p_c log p_c;      p: softmax of a head's logits, nats                          mean over pictures

    The plain way to adapt at test time, with the norms alone trained (select.full: {only: [norm]}) and BatchNorm reading the
    batch (adapters.batch_statistics). Over a long stream it may end at one answer for all. Source: Wang et al. 2021 (TENT).
    """

    batch: ClassVar = ("Images",)
    head: str | None = None  # the head that is asked; null: the newest that was added, else the base's own

    def counts(self, whole: Images) -> dict[str, float]:
        return {"entropy": float(len(whole))}

    def loss(self, micro: Images, views: Any) -> Terms:
        head = self.head or see.newest(views.model)
        logp = see.logits(views.model, views.live.base, micro.pixels, head).float().log_softmax(-1)
        return {"entropy": Term(-(logp.exp() * logp).sum(-1), len(micro))}
