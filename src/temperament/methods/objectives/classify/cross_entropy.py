from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from temperament.engine import see
from temperament.errors import UserError
from temperament.nn.batch import Images
from temperament.parts import number, part
from temperament.protocols import Term, Terms


@part("objectives.classify.cross_entropy", modalities=("image",))
@dataclass(frozen=True)
class CrossEntropy:
    """Plain classification: the likelihood of each picture's class.

        loss = - sum_c q_c log p_c;    q = 1 - s at the label and s / classes everywhere          mean over labelled pictures

    p: softmax of a head's logits (nats); s: label smoothing. Pictures without a label add nothing. `accuracy` is logged.
    """

    batch: ClassVar = ("Images",)
    label_smoothing: float = 0.0  # s
    head: str | None = None  # the head that is asked; null: the newest that was added, else the base's own

    def __post_init__(self):
        if not 0 <= number(self.label_smoothing, 0.0) < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), not {self.label_smoothing}")

    def counts(self, whole: Images) -> dict[str, float]:
        if whole.labels is None:
            raise UserError("train.source", "Images", "its pictures have no labels; use a source of classes, e.g. data.sprites")
        n = float((whole.labels >= 0).sum())
        return {"cross_entropy": n, "accuracy": n}

    def loss(self, micro: Images, views: Any) -> Terms:
        head = self.head or see.newest(views.model)
        logits = see.logits(views.model, views.live.base, micro.pixels, head).float()
        each, n = see.cost(logits, micro.labels, self.label_smoothing), float((micro.labels >= 0).sum())
        right = logits.detach().argmax(-1) == micro.labels
        return {"cross_entropy": Term(each, n), "accuracy": Term(right.float(), n, weight=0)}
