from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from temperament.delta import Delta
from temperament.errors import UserError
from temperament.parts import part


@part("merge.linear")
@dataclass(frozen=True)
class Linear:
    """A weighted sum of deltas: base + scale * sum_i w_i delta_i. With one delta and a strength, the plainest dial (WiSE-FT's line).

    normalise: weights are divided by their sum (a mean of models); otherwise they are taken as they are (task arithmetic).
    Source: Wortsman et al. 2022 (WiSE-FT, soups); Ilharco et al. 2023 (task arithmetic).
    """

    weights: list[float] = field(default_factory=list)  # one a model; empty: all alike
    normalise: bool = True  # divide by the sum of the weights
    scale: float = 1.0  # strength of the sum

    def scale_delta(self, delta: Delta, strength: float, places: Any = None) -> Delta:
        return delta * strength

    def merge(self, base: Any, deltas: Sequence[Delta]) -> Delta:
        weights = self.weights or [1.0] * len(deltas)
        if len(weights) != len(deltas):
            raise UserError("merge.linear.weights", weights, f"{len(deltas)} models are merged; give as many weights")
        total = sum(weights) if self.normalise else 1.0
        if total == 0:
            raise UserError("merge.linear.weights", weights, "they sum to 0; set normalise: false or change them")
        merged = deltas[0] * (self.scale * weights[0] / total)
        for w, d in zip(weights[1:], deltas[1:], strict=True):
            merged = merged + d * (self.scale * w / total)
        return merged
