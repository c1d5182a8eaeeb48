from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from temperament.engine import see
from temperament.nn.batch import Images
from temperament.parts import number, part
from temperament.protocols import Terms


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
        return see.counted(whole)

    def loss(self, micro: Images, views: Any) -> Terms:
        head = self.head or see.newest(views.model)
        logits = see.logits(views.model, views.live.base, micro.pixels, head).float()
        return see.named(logits, micro.labels, self.label_smoothing)
