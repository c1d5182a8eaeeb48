from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from temperament.delta.merging import Blockwise, Setting, Settings, Site
from temperament.errors import UserError
from temperament.methods.merge._kernels import bits16, combined
from temperament.methods.merge._ranges import finite, shares, within
from temperament.parts import part


@part("merge.della")
@dataclass(frozen=True)
class Della(Blockwise):
    """Drop by magnitude: the larger an entry is in its row, the likelier it is kept; kept ones are divided by their
    probability.

        p = density - epsilon + 2 epsilon * rank / (n - 1),   rank 0..n-1 of |t| in its row of n
        t_i <- t_i * Bernoulli(p) / p;   then TIES' election of signs (elect) and the sum

    A vector is one row. Source: Deep et al. 2024, DELLA-Merging.
    """

    grain = "row"

    weights: list[Any] = field(default_factory=list)  # one a model; empty: all alike
    density: Settings = 0.5  # mean probability that an entry is kept
    epsilon: Settings = 0.15  # half the spread of the probabilities
    elect: bool = True  # merge only entries of the elected sign
    scale: Setting = 1.0  # strength of the result
    normalise: bool = True  # divide by the sum of the weights (of those that agree)
    rescale: bool = True  # divide what is kept by its p
    seed: int = 0  # of the draws

    def __post_init__(self):
        finite(weights=self.weights, scale=self.scale)
        shares(density=self.density)
        within(0, 1, high=False, epsilon=self.epsilon)

    def plan(self, site: Site):
        w, scale = site.each(self.weights, "weights"), site.one(self.scale, "scale")
        density, epsilon = site.each(self.density, "density"), site.each(self.epsilon, "epsilon")
        for d, e in zip(density, epsilon, strict=True):
            if 0 < d < 1 and not (d - e > 0 and d + e < 1):
                raise UserError("merge.della.epsilon", e, f"density {d} plus and minus it must stay between 0 and 1")

        def combine(b):
            for i, (d, e) in enumerate(zip(density, epsilon, strict=True)):
                if d <= 0:
                    b.x[i].zero_()
                elif d < 1:
                    rows = b.x[i].view(-1, site.row)
                    rank = rows.abs().argsort(dim=1, stable=True).argsort(dim=1)
                    p = (d - e + 2 * e * rank / max(site.row - 1, 1)).float()
                    drawn = torch.from_numpy(bits16(self.seed, "merge/della", b, i).astype("float32")).view_as(p)
                    kept = rows * (drawn < p * 65536)
                    b.x[i] = (kept / p if self.rescale else kept).view(-1)
            out = combined(b, w, self.normalise, self.elect)
            return out if scale == 1 else out.mul_(scale)

        return combine
