from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import isgenerator
from typing import Any

from temperament.delta import Delta
from temperament.delta.merge_run import depth_in, in_memory
from temperament.delta.merging import Blockwise, Site
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
    For N tasks the paper takes alpha = |sum_i delta_i|_1 / (N |merged|_1), which is 1/N for a plain sum, and tunes beta.
    Source: Wang et al. 2024, LiNeS (paper 021).
    """

    alpha: float = 0.2  # factor of the first block
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
    fewest = property(lambda self: self.inner.fewest)
    most = property(lambda self: self.inner.most)

    @property
    def rise(self) -> float:
        return 1 - self.alpha if self.beta is None else self.beta

    def survey(self, sites: list[Site]) -> Any:
        return self.inner.survey(sites)

    def plan(self, site: Site):
        combine = self.inner.plan(site)
        if isgenerator(combine):
            combine = yield from combine
        factor = self.alpha + self.rise * site.depth

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
        return self.shaped(merged, self.alpha, self.rise, depth_in(base, merged.names))

    def scale_delta(self, delta: Delta, strength: float, places: Any = None) -> Delta:
        return self.shaped(delta, strength, 1 - strength, lambda name: places.depth_of(name).fraction)

    def shaped(self, delta: Delta, alpha: float, beta: float, depth: Any) -> Delta:
        factor = {name: alpha + beta * depth(name) for name in delta.changes}
        # a factor of 1 leaves the change itself, so that no edit is no rounding either
        changes = {name: delta.changes[name].scaled(factor[name]) for name in delta.changes}
        return replace(delta, changes=changes)
