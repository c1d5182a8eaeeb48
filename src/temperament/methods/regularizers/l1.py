from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from temperament.parts import part
from temperament.protocols import Term, Terms


@part("regularizers.l1", papers=["011", "016"])
@dataclass(frozen=True)
class L1:
    """Pull trained weights straight back to a version of the model: few of them then move far, most stay near.

        weight * sum_i |theta_i - theta_i(version)| / n         n entries of the base's own trained tensors, all together

    Weights are compared with what they were, not with zero. `of: new` means an adapter's own tensors instead, whose zero is no
    change; `per_entry: false` takes the sum for the mean.
    Source: Ansell et al. 2022, Composable Sparse Fine-Tuning (paper 011); of new tensors, LoFiT (paper 016).
    """

    per: ClassVar = "step"
    weight: float = 0.1  # factor of the mean; may be a schedule
    of: Literal["weights", "new"] = "weights"  # the base's own trained tensors, or those an adapter brings
    per_entry: bool = True  # divide by the number of entries
    version: str = "start"  # version that is held: start (of the step), base, ema, best

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.version,) if self.of == "weights" else ()

    def loss(self, micro, views) -> Terms:
        live = views.live.tensors()
        if self.of == "weights":
            held = views.live.tensors(self.version)
            apart = [t - held[n] for n, t in live.items()]
        else:
            apart = [p.tensor for n, p in views.live.params.items() if n not in live]
        if not apart:
            return {}
        entries = sum(t.numel() for t in apart) if self.per_entry else 1
        return {"l1": Term(sum(t.abs().sum() for t in apart) / entries, 1, weight=self.weight)}
