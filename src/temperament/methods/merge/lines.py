from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from temperament.delta import Delta
from temperament.parts import part
from temperament.protocols import Merge


@part("merge.lines", papers=["021"])
@dataclass(frozen=True)
class LiNeS:
    """Layer-increasing scaling: shallow blocks keep what they knew, deep ones keep what they learned.

        block l = 1..L of a stack:  delta_l <- (alpha + beta * (l - 1) / (L - 1)) * delta_l
        before the first block: alpha; after the last: alpha + beta

    alpha = 1, beta = 0 is no edit; alpha + beta = 1 leaves the last block as trained. A wrapper on any merge (`of`), or on one delta. As a
    dial, strength s scales alpha = s with beta = 1 - s. Depth is counted in each stack (encoder and decoder apart).
    Source: Wang et al. 2024, LiNeS (paper 021).
    """

    alpha: float = 0.2  # factor of the first block
    beta: float | None = None  # what the last block has more; default 1 - alpha
    of: Merge | None = None  # the merge whose result is shaped; none: the one delta given

    def merge(self, base: Any, deltas: Sequence[Delta]) -> Delta:
        from temperament.parts import build

        merged = (self.of or build("merge.linear", Merge)).merge(base, deltas) if len(deltas) > 1 or self.of else deltas[0]
        return self.shaped(merged, self.alpha, 1 - self.alpha if self.beta is None else self.beta, depths(base))

    def scale_delta(self, delta: Delta, strength: float, places: Any = None) -> Delta:
        return self.shaped(delta, strength, 1 - strength, places.depth_of)

    def shaped(self, delta: Delta, alpha: float, beta: float, depth_of: Any) -> Delta:
        factor = {name: alpha + beta * depth_of(name).fraction for name in delta.changes}
        # a factor of 1 leaves the change itself, so that no edit is no rounding either
        changes = {name: change.scaled(factor[name]) for name, change in delta.changes.items()}
        return replace(delta, changes=changes)


def depths(base: Any):
    return base.places.depth_of
