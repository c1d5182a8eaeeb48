from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from temperament.delta.merging import Blockwise, Gather, Site
from temperament.errors import UserError
from temperament.methods.merge._kernels import gram, weighted_sum
from temperament.methods.merge._ranges import finite
from temperament.parts import part


@part("merge.multislerp", papers=["166"])
@dataclass(frozen=True)
class MultiSlerp(Blockwise):
    """SLERP for any number of models: a weighted mean taken in the tangent space of the sphere at their mean direction.

        u_i = x_i / |x_i|,  m = sum_i w_i u_i / |.|,  v = sum_i w_i (u_i - <u_i, m> m)
        x = (sum_i w_i |x_i|) * (cos|v| m + sin|v| v / |v|)

    x are the differences from the base (about "base") or the weights (about "zero"). Everything happens in the span of the
    models, so only their inner products are needed: one pass, then a weighted sum. Source: Goddard 2025 (Multi-SLERP); paper
    166.
    """

    weights: list[Any] = field(default_factory=list)  # one a model; empty: all alike
    normalise: bool = True  # divide the weights by their sum
    about: Literal["base", "zero"] = "base"  # centre of the sphere

    def __post_init__(self):
        finite(weights=self.weights)

    @property
    def space(self):
        return "difference" if self.about == "base" else "weights"

    @property
    def needs_base(self):
        return self.about == "base"

    @property
    def everywhere(self):
        return self.about == "zero" and not self.normalise

    def plan(self, site: Site):
        w = site.parts_of_one(self.weights) if self.normalise else site.each(self.weights, "weights")
        if len(w) == 1:
            return lambda b: b.x[0]
        G = sum((yield Gather(gram)))
        lengths = G.diagonal().sqrt()
        unit = G.new_tensor(w) / (lengths + 1e-8)  # sum_i w_i u_i in terms of x_i
        size = math.sqrt(max(float(unit @ G @ unit), 0.0))
        if size < 1e-8:
            if len(w) == 2 or float(lengths.max()) == 0:
                return lambda b: weighted_sum(b.x, w)
            raise UserError(
                "merge.multislerp.weights", self.weights, f"the weighted directions of {site.name} cancel; use other weights"
            )
        mean = unit / size
        dots = (G @ mean) / (lengths + 1e-8)
        tangent = unit - (G.new_tensor(w) * dots).sum() * mean
        angle = math.sqrt(max(float(tangent @ G @ tangent), 0.0)) + 1e-8
        length = float((lengths * G.new_tensor(w)).sum())
        c = (length * (math.cos(angle) * mean + math.sin(angle) / angle * tangent)).tolist()
        return lambda b: weighted_sum(b.x, c)
