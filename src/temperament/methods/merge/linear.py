from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from temperament.delta import Delta, Dense, Replace
from temperament.delta.merge_run import averaged_additions
from temperament.delta.merging import Blockwise, Setting, Site
from temperament.methods.merge._kernels import weighted_sum
from temperament.methods.merge._ranges import finite
from temperament.parts import part


@part("merge.linear", papers=["081", "120"])
@dataclass(frozen=True)
class Linear(Blockwise):
    """A weighted sum of deltas: base + scale * sum_i w_i delta_i. With one delta and a strength, the plainest dial (WiSE-FT's
    line).

    normalise: weights are divided by their sum (a mean of models); otherwise they are taken as they are (task arithmetic). of
    "weights": sum_i w_i W_i, the same with `normalise` but for rounding; no base is read, so none need be known. Changes of
    low rank stay of low rank (ranks add). Source: Wortsman et al. 2022 (WiSE-FT, soups); Ilharco et al. 2023 (task
    arithmetic).
    """

    weights: list[Any] = field(default_factory=list)  # one a model (number, gradient over depth, rules); empty: all alike
    normalise: bool = True  # divide by the sum of the weights
    scale: Setting = 1.0  # strength of the sum
    of: Literal["changes", "weights"] = "changes"  # what is summed

    def __post_init__(self):
        finite(weights=self.weights, scale=self.scale)

    @property
    def space(self):
        return "difference" if self.of == "changes" else "weights"

    @property
    def needs_base(self):
        return self.of == "changes"

    @property
    def everywhere(self):
        return self.of == "weights" and not (self.normalise and self.scale == 1)

    def plan(self, site: Site):
        w = self.coefficients(site)
        return lambda b: weighted_sum(b.x, w)

    def coefficients(self, site: Site) -> list[float]:
        w = site.parts_of_one(self.weights) if self.normalise else site.each(self.weights, "weights")
        scale = site.one(self.scale, "scale")
        return [scale * a for a in w]

    def scale_delta(self, delta: Delta, strength: float, places: Any = None) -> Delta:
        return delta * strength

    def merge(self, base: Any, deltas: Sequence[Delta]) -> Delta:
        plain = all(isinstance(v, (int, float)) for v in [*self.weights, self.scale]) and self.of == "changes"
        compact = plain and not any(isinstance(c, (Dense, Replace)) for d in deltas for c in d.changes.values())
        if not compact:
            return super().merge(base, deltas)
        self.check(len(deltas))
        w = self.coefficients(Site("", (), len(deltas), method="merge.linear"))
        several = {n for d in deltas for n in d.additions if sum(n in other.additions for other in deltas) > 1}
        shared = averaged_additions([d.restrict(several & {*d.additions}) for d in deltas], self.shares(len(deltas)))
        merged, *rest = (replace(d, additions={n: a for n, a in d.additions.items() if n not in several}) * share
                         for share, d in zip(w, deltas, strict=True))  # fmt: skip
        for d in rest:
            merged = merged + d
        return replace(merged.baked(), additions={**merged.baked().additions, **shared}) if shared else merged

    def baseless(self):
        return replace(self, of="weights") if self.normalise and self.scale == 1 else self

    def shares(self, models: int) -> list[float]:
        plain = len(self.weights) == models and all(isinstance(v, (int, float)) for v in self.weights)
        return list(self.weights) if plain else super().shares(models)
