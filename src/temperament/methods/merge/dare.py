from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from temperament.delta.merging import Blockwise, Setting, Settings, Site
from temperament.methods.merge._kernels import bits16, combined
from temperament.methods.merge._ranges import finite, shares
from temperament.parts import part


@part("merge.dare")
@dataclass(frozen=True)
class Dare(Blockwise):
    """Drop and rescale: every entry of a difference is kept with probability p = density and divided by p, then merged.

        t_i = (W_i - base) * Bernoulli(p) / p;   W = base + scale * sum_i w_i t_i        (elect: with TIES' election of signs)

    Draws are addressed by (seed, tensor, model, position), 16 bits each: p is a multiple of 2^-16, and the division is by
    that multiple, so the mean is exact. Source: Yu et al. 2024, Language Models are Super Mario.
    """

    weights: list[Any] = field(default_factory=list)  # one a model; empty: all alike
    density: Settings = 0.5  # probability that an entry is kept
    elect: bool = False  # merge only entries of the elected sign (DARE-TIES)
    scale: Setting = 1.0  # strength of the result
    normalise: bool = False  # divide by the sum of the weights (of those that agree)
    rescale: bool = True  # divide what is kept by p
    seed: int = 0  # of the draws

    def __post_init__(self):
        finite(weights=self.weights, scale=self.scale)
        shares(density=self.density)

    def plan(self, site: Site):
        w, scale = site.each(self.weights, "weights"), site.one(self.scale, "scale")
        cuts = [min(max(round(d * 65536), 1), 65536) if d > 0 else 0 for d in site.each(self.density, "density")]

        def combine(b):
            for i, cut in enumerate(cuts):
                if cut < 65536:
                    x = b.x[i].numpy()
                    np.multiply(x, bits16(self.seed, "merge/dare", b, i) < cut, out=x)
                if 0 < cut < 65536 and self.rescale:
                    b.x[i].mul_(65536 / cut)
            out = combined(b, w, self.normalise, self.elect)
            return out if scale == 1 else out.mul_(scale)

        return combine
