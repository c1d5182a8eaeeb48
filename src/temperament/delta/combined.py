"""Changes made of changes: sums, masks, rows; and the sum of two changes in its smallest exact form."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from temperament.delta.change import Change, Dense, LowRank, wide


@dataclass(frozen=True, eq=False)
class Sum(Change, kind="sum"):
    """W' = W + sum_i delta_i(W): every term reads the same base weight, so order does not matter."""

    changes: tuple[Change, ...]

    @property
    def weight_shape(self):
        return next((shape for c in self.changes if (shape := c.weight_shape) is not None), None)

    def difference(self, weight=None):
        total = self.changes[0].delta(weight)
        for change in self.changes[1:]:
            total = total + change.delta(weight)
        return total


@dataclass(frozen=True, eq=False)
class Masked(Change, kind="masked"):
    """W' = W + mask * delta(W);   mask broadcasts to W (rows, columns, entries). Bool is exact, float is soft."""

    change: Change
    mask: Tensor

    @property
    def weight_shape(self):
        return self.change.weight_shape

    def difference(self, weight=None):
        delta = self.change.delta(weight)
        return torch.where(self.mask, delta, 0.0) if self.mask.dtype == torch.bool else wide(self.mask) * delta

    def moved(self, weight):
        if self.mask.dtype != torch.bool:
            return wide(weight) + self.difference(weight)
        return torch.where(self.mask, self.change.apply(weight), weight)


@dataclass(frozen=True, eq=False)
class Rows(Change, kind="rows"):
    """A change of W[rows] alone: one part of a fused qkv, some heads, new vocabulary rows.   rows (k,) distinct; shape of W."""

    change: Change
    rows: Tensor
    shape: tuple[int, ...]

    @staticmethod
    def span(change: Change, start: int, stop: int, shape: tuple[int, ...]) -> Rows:
        return Rows(change, torch.arange(start, stop), tuple(shape))

    @property
    def weight_shape(self):
        return tuple(self.shape)

    def difference(self, weight=None):
        delta = self.change.delta(None if weight is None else weight[self.rows])
        return torch.zeros(self.shape, dtype=delta.dtype, device=delta.device).index_copy(0, self.rows, delta)

    def moved(self, weight):
        new = self.change.apply(weight[self.rows])
        return weight.index_copy(0, self.rows, new.to(weight.dtype))


def add(x: Change, y: Change) -> Change:
    """x + y: terms of scale 0 vanish, dense adds to dense, low rank of equal scale and layout stays low rank (ranks add);
    otherwise the expression Sum, which rounds nothing."""
    if x.scale == 0 or y.scale == 0:
        return y if x.scale == 0 else x
    if isinstance(x, Dense) and isinstance(y, Dense):
        return Dense(x.delta() + y.delta())
    if isinstance(x, LowRank) and isinstance(y, LowRank):
        assert x.weight_shape == y.weight_shape
        if (x.scale, x.layout) == (y.scale, y.layout):
            return replace(x, A=torch.cat([x.A, y.A]), B=torch.cat([x.B, y.B], dim=1))
    terms = [c.changes if isinstance(c, Sum) and c.scale == 1 else (c,) for c in (x, y)]
    return Sum((*terms[0], *terms[1]))
