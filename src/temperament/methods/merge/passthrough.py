from __future__ import annotations

from dataclasses import dataclass

from temperament.delta.merging import Blockwise, Setting, Site
from temperament.parts import part


@part("merge.passthrough")
@dataclass(frozen=True)
class Passthrough(Blockwise):
    """The one model's tensors as they are, or scaled: what layer slices are stacked with.

    W = scale * W_1. Scale 1 keeps every bit. Duplicated layers whose o_proj and down_proj are scaled by 0 start as the
    identity.
    """

    space = "weights"
    needs_base = False
    fewest = most = 1

    scale: Setting = 1.0  # factor of the weights; may follow depth and name

    @property
    def everywhere(self):
        return self.scale != 1

    def plan(self, site: Site):
        scale = site.one(self.scale, "scale")
        return lambda b: b.x[0] if scale == 1 else b.x[0].mul_(scale)
