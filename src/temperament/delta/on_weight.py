"""Changes that are functions of the base weight: they cannot be added to another base without it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from temperament.delta.change import Change, Layout, wide


@dataclass(frozen=True, eq=False)
class Replace(Change, kind="replace"):
    """W' = tensor, whatever W is: exact where W + (W' - W) would round. Between 0 and 1 it is the line from W to the tensor."""

    reads_weight = True
    tensor: Tensor

    @property
    def weight_shape(self):
        return tuple(self.tensor.shape)

    def difference(self, weight):
        return wide(self.tensor) - wide(weight)

    def moved(self, weight):
        return self.tensor


@dataclass(frozen=True, eq=False)
class Multiplied(Change, kind="multiplied"):
    """W' = W * m;   m in the shape of W, or (out, 1) for rows, (1, in) for columns (IA3, SSF, pruning masks)."""

    reads_weight = True
    m: Tensor

    def difference(self, weight):
        return wide(weight) * (wide(self.m) - 1)

    def moved(self, weight):
        return wide(weight) * wide(self.m)


@dataclass(frozen=True, eq=False)
class Transformed(Change, kind="transformed"):
    """W' = L W R;   left (out, out), right (in * kernel, in * kernel) on W flattened to two axes; either may be absent."""

    reads_weight = True
    left: Tensor | None = None
    right: Tensor | None = None

    def moved(self, weight):
        new = wide(weight).flatten(1)
        new = new if self.left is None else wide(self.left) @ new
        new = new if self.right is None else new @ wide(self.right)
        return new.view(weight.shape)

    def difference(self, weight):
        return self.moved(weight) - wide(weight)


@dataclass(frozen=True, eq=False)
class Renormalised(Change, kind="renormalised"):
    """W' = magnitude * V / |V|, V = change(W), |V| the norm over the inputs of each output;   magnitude (out,).

    DoRA (Liu et al. 2024): direction by the inner change, length by the magnitude.
    """

    reads_weight = True
    change: Change
    magnitude: Tensor
    layout: Layout = "linear"

    @property
    def weight_shape(self):
        return self.change.weight_shape

    def moved(self, weight):
        V = self.change.apply(wide(weight))
        out = 0 if self.layout == "linear" else 1
        norm = torch.linalg.vector_norm(V, dim=[i for i in range(V.dim()) if i != out], keepdim=True)
        return wide(self.magnitude).reshape(norm.shape) / norm * V

    def difference(self, weight):
        return self.moved(weight) - wide(weight)
