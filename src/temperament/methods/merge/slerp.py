from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from temperament.delta.merging import Blockwise, Gather, Setting, Site
from temperament.methods.merge._kernels import gram, weighted_sum
from temperament.methods.merge._ranges import finite, within
from temperament.parts import part


@part("merge.slerp", papers=["166"])
@dataclass(frozen=True)
class Slerp(Blockwise):
    """From one model to another along the great circle of every tensor.

        W = sin((1 - t) o) / sin(o) * W_1 + sin(t o) / sin(o) * W_2,      o = angle between W_1 and W_2

    t = 0 is the first model, 1 the second, bit for bit; nearly parallel tensors are joined by a line. `t` may follow depth
    and name, as in the paper: t: [{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0.5, 0.7, 0.3,
    0]}, {value: 0.5}]. Or a weight for each of the two, t = w_2 / (w_1 + w_2). About "base" the differences from it are turned,
    not the weights. Try it with the unmodified instruct parent as one of the two. Source: Shoemake 1985; Fine-tuning for
    domain adaptation (paper 166).
    """

    fewest = most = 2

    t: Setting = 0.5  # where on the way: 0 the first model, 1 the second
    line_above: float = 0.9995  # |cosine| above which the way is a line
    weights: list[Any] = field(default_factory=list)  # instead of t, one a model; empty: t
    about: Literal["base", "zero"] = "zero"  # centre of the circle

    def __post_init__(self):
        finite(t=self.t, weights=self.weights)
        within(0, 1, high=False, line_above=self.line_above)

    @property
    def space(self):
        return "difference" if self.about == "base" else "weights"

    @property
    def needs_base(self):
        return self.about == "base"

    def plan(self, site: Site):
        t = site.one(self.t, "t")
        if self.weights:
            first, second = site.each(self.weights, "weights")
            t = second / (first + second) if abs(first + second) >= 1e-6 else 0.5
        products = sum((yield Gather(gram)))
        w = arc(products, t, self.line_above)
        return lambda b: weighted_sum(b.x, w)


def arc(products, t: float, line_above: float) -> list[float]:
    lengths = [math.sqrt(float(products[i, i])) for i in (0, 1)]
    cosine = float(products[0, 1]) / (lengths[0] * lengths[1]) if min(lengths) > 1e-8 else 1.0
    cosine = min(max(cosine, -1.0), 1.0)
    if abs(cosine) > line_above:
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
