from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from temperament.delta.merging import Blockwise, Setting, Site
from temperament.methods.merge._kernels import summed
from temperament.methods.merge._ranges import finite
from temperament.parts import part


@part("merge.task_arithmetic")
@dataclass(frozen=True)
class TaskArithmetic(Blockwise):
    """Task vectors added: base + scale * sum_i w_i (W_i - base).

    A negative weight takes a skill away. Source: Ilharco et al. 2023, Editing Models with Task Arithmetic.
    """

    weights: list[Any] = field(default_factory=list)  # one a model; empty: 1 each
    scale: Setting = 1.0  # strength of the sum; tuned, 0.3-0.5 for many tasks
    normalise: bool = False  # divide by the sum of the weights

    def __post_init__(self):
        finite(weights=self.weights, scale=self.scale)

    def plan(self, site: Site):
        w, scale = site.each(self.weights, "weights"), site.one(self.scale, "scale")
        return lambda b: summed(b.x, [scale * a for a in w] if not self.normalise else w, self.normalise).mul_(
            scale if self.normalise else 1
        )
