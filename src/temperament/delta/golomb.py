"""Sparse signs in few bits: the gaps between entries in Rice's code (Golomb's with a power of two), and a sign bit each.

    gap g between kept entries:  g >> b ones of unary, ended by a bit;  the low b bits as they are;  one bit for the sign

b is the one that takes fewest bits. For kept share p the entropy is n (-(1-p) log2(1-p) - p log2(p/2)) bits; the code stays within a
few per cent of it for p up to a half. Three streams (unary, low bits, signs), so that both ways are whole-array operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from temperament.delta.change import Change, Layout, LowRank


def encode(signs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """(unary, low bits, sign bits) packed, b, and how many entries are not 0. signs: any numbers, flat."""
    at = np.flatnonzero(signs)
    gaps = np.diff(at, prepend=-1) - 1
    b = best(gaps)
    unary = np.zeros(int((gaps >> b).sum()) + len(gaps), np.uint8)
    unary[np.cumsum((gaps >> b) + 1) - 1] = 1
    low = ((gaps[:, None] >> np.arange(b)) & 1).astype(np.uint8)
    return np.packbits(unary), np.packbits(low.ravel()), np.packbits(signs[at] < 0), b, len(at)


def best(gaps: np.ndarray) -> int:
    """The number of low bits with which the code is shortest."""
    cost = [(int((gaps >> b).sum()) + len(gaps) * (1 + b), b) for b in range(32)]
    return min(cost)[1]


def decode(unary: np.ndarray, low: np.ndarray, negative: np.ndarray, b: int, count: int, n: int) -> np.ndarray:
    """int8 signs of length n."""
    ends = np.flatnonzero(np.unpackbits(unary))[:count]
    high = np.diff(ends, prepend=-1) - 1
    bits = np.unpackbits(low, count=count * b).reshape(count, b).astype(np.int64)
    gaps = (high << b) + (bits << np.arange(b)).sum(1)
    out = np.zeros(n, np.int8)
    out[np.cumsum(gaps + 1) - 1] = 1 - 2 * np.unpackbits(negative, count=count).astype(np.int8)
    return out


@dataclass(frozen=True, eq=False)
class Rice(Change, kind="rice"):
    """W + scale * s, s in {-1, 0, 1} as `encode` writes it: on disk a fraction of a bit an entry.

    unary, low, negative: the three streams, uint8; low_bits: b; count: entries that are not 0.
    """

    unary: Tensor
    low: Tensor
    negative: Tensor
    shape: tuple[int, ...]
    low_bits: int
    count: int

    @staticmethod
    def pack(signs: Tensor, scale: float = 1.0) -> Rice:
        """From a tensor whose signs count."""
        *streams, b, count = encode(signs.detach().reshape(-1).cpu().numpy())
        return Rice(*(torch.from_numpy(s) for s in streams), tuple(signs.shape), b, count, scale=scale)

    @property
    def signs(self) -> Tensor:
        streams = (t.cpu().numpy() for t in (self.unary, self.low, self.negative))
        flat = decode(*streams, self.low_bits, self.count, math.prod(self.shape))
        return torch.from_numpy(flat).view(tuple(self.shape)).to(self.unary.device)

    @property
    def weight_shape(self):
        return tuple(self.shape)

    def difference(self, weight=None):
        return self.signs.float()


@dataclass(frozen=True, eq=False)
class CodedLowRank(Change, kind="rice_low_rank"):
    """W + scale * B A with both factors as signs and a size: a compressed adapter."""

    A: Rice
    B: Rice
    layout: Layout = "linear"

    def plain(self) -> LowRank:
        return LowRank(self.A.delta(), self.B.delta(), self.layout, scale=self.scale)

    @property
    def weight_shape(self):
        shape = (self.B.shape[0], *self.A.shape[1:])
        return tuple(shape if self.layout == "linear" else shape[::-1])

    def difference(self, weight=None):
        return LowRank(self.A.delta(), self.B.delta(), self.layout).difference(weight)
