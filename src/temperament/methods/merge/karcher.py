from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from temperament.delta.merging import Blockwise, Gather, Site
from temperament.methods.merge._kernels import gram, weighted_sum
from temperament.parts import part

OPPOSITE = 1e-3  # radian from pi: nearer, the direction of an arc is noise


@part("merge.karcher", papers=["166"])
@dataclass(frozen=True)
class Karcher(Blockwise):
    """The point of the sphere nearest to all models, by angle: SLERP's exact n-way form.

        u_i = W_i / |W_i|;   m minimises sum_i w_i angle(m, u_i)^2;   W = (sum_i w_i |W_i|) m
        m <- cos|v| m + sin|v| v / |v|,   v = sum_i w_i (a_i / sin a_i) (u_i - cos a_i m),  a_i = angle(m, u_i)

    Between models that point exactly opposite (to 1e-3 radian) no arc is the shortest: such a model does not pull, and a mean
    whose directions cancel begins at the first model. All steps stay in the span of the models: they are taken on the inner
    products, in fp64, and cost nothing. For two models of equal weight it is SLERP's midpoint direction. Source: Karcher 1977;
    paper 166 for merging.
    """

    space = "weights"
    needs_base = False

    weights: list[Any] = field(default_factory=list)  # one a model; empty: all alike
    steps: int = 10  # of the iteration at most
    tolerance: float = 1e-5  # length of a step at which it ends

    def plan(self, site: Site):
        w = torch.tensor(site.parts_of_one(self.weights), dtype=torch.float64)
        G = sum((yield Gather(gram)))
        lengths = G.diagonal().sqrt()
        live = lengths > self.tolerance
        if not bool(live.any()):
            return lambda b: b.x[0].zero_()
        share = torch.where(live, w, 0.0)
        if abs(float(share.sum())) < self.tolerance:  # of what has a direction nothing is wanted
            return lambda b: weighted_sum(b.x, w.tolist())
        share = share / share.sum()
        inverse = torch.where(live, 1 / lengths.clamp_min(1e-300), 0.0)
        G = G * inverse[:, None] * inverse  # of the unit vectors
        norm = lambda c: math.sqrt(max(float(c @ G @ c), 0.0))
        m = share.clone()
        if norm(m) < max(self.tolerance, OPPOSITE):
            m = torch.zeros_like(w)
            m[int(live.nonzero()[0])] = 1.0
        m = m / norm(m)
        for _ in range(self.steps):
            dots = (G @ m).clamp(-1, 1)
            angles = dots.acos()
            drawn = live & (angles >= self.tolerance) & (angles <= math.pi - OPPOSITE)
            pull = torch.where(drawn, share * angles / angles.sin().clamp_min(1e-300), 0.0)
            v = pull - (pull * dots).sum() * m
            length = norm(v)
            if length < self.tolerance:
                break
            m = math.cos(length) * m + math.sin(length) / length * v
            m = m / norm(m)
        c = (float((w * lengths).sum()) * m * inverse).tolist()
        return lambda b: weighted_sum(b.x, c)
