from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from temperament.delta.merging import Blockwise, Setting, Settings, Site
from temperament.delta.selection import keep_from, largest
from temperament.methods.merge._kernels import combined
from temperament.methods.merge._ranges import finite, shares
from temperament.parts import part


@part("merge.ties")
@dataclass(frozen=True)
class Ties(Blockwise):
    """Trim, elect signs, merge disjointly.

        t_i  = W_i - base, of each tensor the largest |t_i| kept (density of them), the rest 0
        s    = sign(sum_i w_i t_i)
        W    = base + scale * (sum of the w_i t_i with sign s) / (sum of their w_i)

    The threshold is exact; entries equal to it are all kept. Source: Yadav et al. 2023, TIES-Merging.
    """

    weights: list[Any] = field(default_factory=list)  # one a model; empty: all alike
    density: Settings = 0.2  # share of every tensor's entries that is kept
    scale: Setting = 1.0  # strength of the result
    normalise: bool = True  # divide by the weights of those that agree: a mean, not a sum

    def __post_init__(self):
        finite(weights=self.weights, scale=self.scale)
        shares(density=self.density)

    def plan(self, site: Site):
        w, scale = site.each(self.weights, "weights"), site.one(self.scale, "scale")
        density = site.each(self.density, "density")
        counts = [site.numel if d >= 1 else max(1, int(d * site.numel)) if d > 0 else 0 for d in density]
        cuts = yield from largest(site, counts)

        def combine(b):
            for v, cut in zip(b.x, cuts, strict=True):
                keep_from(v, cut)
            out = combined(b, w, self.normalise, elect=True)
            return out if scale == 1 else out.mul_(scale)

        return combine
