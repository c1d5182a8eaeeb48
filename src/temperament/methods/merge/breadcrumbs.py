from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from temperament.delta.merging import Block, Blockwise, Setting, Settings, Site
from temperament.delta.selection import keep_from, largest, magnitudes
from temperament.methods.merge._kernels import combined
from temperament.methods.merge._ranges import finite, shares, within
from temperament.parts import part


@part("merge.breadcrumbs", papers=["248"])
@dataclass(frozen=True)
class Breadcrumbs(Blockwise):
    """Both tails of every difference are masked: the smallest entries are noise, the largest outliers.

        of a tensor's n entries by |W_i - base|: the floor(gamma n) largest and the smallest are 0, floor(density n) are kept
        W = base + scale * sum_i w_i t_i        (elect: with TIES' election of signs)

    In the paper's words: beta = 1 - density - gamma is the share of noise, 1 - gamma its gamma. Kept entries are not
    rescaled, so a scale found for few tasks serves for many. density 1 is no edit. Source: Davari & Belilovsky 2024 (paper
    248).
    """

    weights: list[Any] = field(default_factory=list)  # one a model; empty: 1 each
    density: Settings = 0.1  # share of every tensor's entries that is kept
    gamma: Settings = 0.01  # share of the largest that is removed
    elect: bool = False  # merge only entries of the elected sign
    scale: Setting = 1.0  # strength of the result; 0.3 in the paper
    normalise: bool = False  # divide by the sum of the weights (of those that agree)

    def __post_init__(self):
        finite(weights=self.weights, scale=self.scale)
        shares(density=self.density)
        within(0, 1, high=False, gamma=self.gamma)

    def plan(self, site: Site):
        w, scale, n = site.each(self.weights, "weights"), site.one(self.scale, "scale"), site.numel
        counts = []
        for d, g in zip(site.each(self.density, "density"), site.each(self.gamma, "gamma"), strict=True):
            kept = n if d >= 1 else int(d * n)
            noise = max(0, n - kept - int(g * n))
            counts += [n - noise, n - noise - kept]  # from the top: all that is not noise; the outliers

        def twice(b: Block):
            return [v for v in magnitudes(b) for _ in range(2)]

        cuts = yield from largest(site, counts, twice)

        def combine(b):
            for v, low, high in zip(b.x, cuts[::2], cuts[1::2], strict=True):
                if high != float("inf"):
                    v.sub_(keep_from(v.clone(), high))
                keep_from(v, low)
            out = combined(b, w, self.normalise, self.elect)
            return out if scale == 1 else out.mul_(scale)

        return combine
