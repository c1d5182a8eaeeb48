from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from temperament.parts import part
from temperament.protocols import Term, Terms


@part("regularizers.l1", papers=["011"])
@dataclass(frozen=True)
class L1:
    """Pull trained weights straight back to a version of the model: few of them then move far, most stay near.

        weight * sum_i |theta_i - theta_i(version)| / n         n entries of the base's own trained tensors, all together

    Weights are compared with what they were, not with zero. An adapter's new tensors are not meant and not counted.
    Source: Ansell et al. 2022, Composable Sparse Fine-Tuning (paper 011).
    """

    per: ClassVar = "step"
    weight: float = 0.1  # factor of the mean; may be a schedule
    version: str = "start"  # version that is held: start (of the step), base, previous, ema

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.version,)

    def loss(self, micro, views) -> Terms:
        live, held = views.live.tensors(), views.live.tensors(self.version)
        entries = sum(t.numel() for t in live.values())
        total = sum((t - held[n]).abs().sum() for n, t in live.items())
        return {"l1": Term(total / max(entries, 1), 1, weight=self.weight)} if live else {}
