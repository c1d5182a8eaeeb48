from __future__ import annotations

from dataclasses import dataclass

from temperament.delta.merging import Blockwise, Setting, Site
from temperament.methods.merge._ranges import finite, numbers
from temperament.parts import part


@part("merge.nearswap")
@dataclass(frozen=True)
class NearSwap(Blockwise):
    """From the base towards a model, in every entry by no more than t: what differs little is taken whole, what differs much
    hardly.

        W = base + w (W_1 - base),   w = min(1, t / |W_1 - base|),   which is   base + clip(W_1 - base, -t, t)

    A large t is the model, a small one moves every entry that changed by the same length. Source: QuartetAnemoi-70B
    (alchemonaut 2024).
    """

    fewest = most = 1

    t: Setting = 0.001  # the most an entry moves

    def __post_init__(self):
        finite(t=self.t)
        if min(map(float, numbers(self.t))) <= 0:
            raise ValueError("t must be above 0")

    def plan(self, site: Site):
        t = site.one(self.t, "t")
        return lambda b: b.x[0].clamp_(-t, t)
