from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import isgenerator
from typing import Any

import torch
from torch import Tensor

from temperament.delta import Delta
from temperament.delta.merge_run import depth_in, in_memory, tensors_of
from temperament.delta.merging import Blockwise, Gather, Made, Site
from temperament.parts import build, part
from temperament.protocols import Merge


@part("merge.lines", papers=["021"])
@dataclass(frozen=True)
class LiNeS(Blockwise):
    """Layer-increasing scaling: shallow blocks keep what they knew, deep ones keep what they learned.

        block l = 1..L of a stack:  delta_l <- (alpha + beta * (l - 1) / (L - 1)) * delta_l
        before the first block: alpha; after the last: alpha + beta

    alpha = 1, beta = 0 is no edit; alpha + beta = 1 leaves the last block as trained. A wrapper on any merge (`of`), or on one
    delta. As a dial, strength s scales alpha = s with beta = 1 - s. Depth is counted in each stack (encoder and decoder apart).
    For N tasks the paper tunes beta and takes, over all tensors together, what `alpha: null` takes:
        alpha = |sum_i delta_i|_1 / (N |merged|_1),    1/N for a plain sum, 1 for a mean
    Source: Wang et al. 2024, LiNeS (paper 021).
    """

    alpha: float | None = 0.2  # factor of the first block; null: the paper's, from the deltas and their merge
    beta: float | None = None  # what the last block has more; default 1 - alpha
    of: Merge | None = None  # the merge whose result is shaped; none: the one delta given, or the mean of several

    def __post_init__(self):
        if not isinstance(self.inner, Blockwise):  # it searches or trains, of which a wrapper would show nothing
            name = type(self.inner).part_name
            raise ValueError(f"of must be a merge tensor by tensor, which {name} is not; shape its result in a later merge")

    @property
    def inner(self) -> Any:
        return self.of or build("merge.linear", Merge)

    space = property(lambda self: self.inner.space)
    grain = property(lambda self: self.inner.grain)
    everywhere = property(lambda self: self.inner.everywhere)
    fewest = property(lambda self: self.inner.fewest)
    most = property(lambda self: self.inner.most)

    def rise(self, alpha: float) -> float:
        return 1 - alpha if self.beta is None else self.beta

    def survey(self, sites: list[Site]) -> Any:
        made = self.inner.survey(sites)
        return made if self.alpha is not None else self.measured(made)

    def measured(self, made: Any):
        """(what the survey of the inner merge gave, alpha)"""
        state = (yield from made) if isgenerator(made) else made
        change = (lambda v, b: v) if self.space == "difference" else (lambda v, b: v - b.base)
        sums = yield Gather(lambda b: (len(b.x), size(sum(change(v, b) for v in b.x))))
        sizes = yield Made(self.inner, state, lambda out, b: size(change(out, b)))
        return state, ratio(sum(s for _, s in sums), sum(sizes), sums[0][0] if sums else 1)

    def plan(self, site: Site):
        alpha = self.alpha
        if alpha is None:
            state, alpha = site.state
            site = replace(site, state=state)
        combine = self.inner.plan(site)
        if isgenerator(combine):
            combine = yield from combine
        factor = alpha + self.rise(alpha) * site.depth

        def shaped(b):
            out = combine(b)
            if factor == 1:
                return out
            return out.mul_(factor) if self.space == "difference" else out.sub_(b.base).mul_(factor).add_(b.base)

        return shaped

    def merge(self, base: Any, deltas: Sequence[Delta]) -> Delta:
        if self.space != "difference":
            return in_memory(self, base, deltas)
        merged = deltas[0] if len(deltas) == 1 and self.of is None else self.inner.merge(base, deltas)
        alpha = self.alpha if self.alpha is not None else self.found(base, deltas, merged)
        return self.shaped(merged, alpha, self.rise(alpha), depth_in(base, merged.names))

    def found(self, base: Any, deltas: Sequence[Delta], merged: Delta) -> float:
        """The paper's alpha, a tensor at a time."""
        source, total, own = tensors_of(base), 0.0, 0.0
        for name in merged.changes:
            weight = source.read(name)
            change = lambda d, name=name, weight=weight: d.change(name).delta(weight)
            total += size(sum(change(d) for d in deltas if name in d.changes))
            own += size(change(merged))
        return ratio(total, own, len(deltas))

    def scale_delta(self, delta: Delta, strength: float, places: Any = None) -> Delta:
        return self.shaped(delta, strength, 1 - strength, lambda name: places.depth_of(name).fraction)

    def shaped(self, delta: Delta, alpha: float, beta: float, depth: Any) -> Delta:
        factor = {name: alpha + beta * depth(name) for name in delta.changes}
        # a factor of 1 leaves the change itself, so that no edit is no rounding either
        changes = {name: delta.changes[name].scaled(factor[name]) for name in delta.changes}
        return replace(delta, changes=changes)


def size(change: Tensor) -> float:
    """|.|_1"""
    return float(change.abs().sum(dtype=torch.float64))


def ratio(total: float, merged: float, models: int) -> float:
    return total / (models * merged) if merged else 1.0  # of no change nothing is left to shape
