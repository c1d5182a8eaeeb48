"""Arithmetic several merges share, on flat fp32 blocks, in place: what a core does on a block it already holds in its cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from temperament.delta.merging import Block
from temperament.nn import draws

TINY = 1e-45  # the smallest float: a sum of exactly 0 counts as positive
LANES = 16  # draws of 16 bits in one step of the counter


def weighted_sum(x: Sequence[Tensor], w: Sequence[float]) -> Tensor:
    """sum_i w_i x_i, into x[0]."""
    total = x[0].mul_(w[0])
    for v, a in zip(x[1:], w[1:], strict=True):
        total.add_(v, alpha=a)
    return total


def summed(x: Sequence[Tensor], w: Sequence[float], normalise: bool) -> Tensor:
    """sum_i w_i x_i, divided by sum_i w_i where asked (and where that is not 0)."""
    total = sum(w) if normalise else 1.0
    total = 1.0 if abs(total) < 1e-8 else total
    out = weighted_sum(x, w)
    return out if total == 1 else out.div_(total)


def elected(x: Sequence[Tensor], w: Sequence[float], normalise: bool) -> Tensor:
    """Disjoint merge (TIES): of every entry only the models whose sign is that of sum_i x_i; x (weighted already) is
    overwritten.

        s = sign(sum_i x_i), 0 as +;   sum_i x_i [sign x_i = s]  /  sum_i w_i [sign x_i = s];   0 where nobody votes
    """
    sign = x[0].clone()
    for v in x[1:]:
        sign.add_(v)
    sign.add_(TINY).sign_()
    votes = torch.zeros_like(sign) if normalise else None
    for v, a in zip(x, w, strict=True):
        v.mul_(sign).clamp_min_(0)  # what disagrees is negative now
        if votes is not None:
            votes.add_(v.sign(), alpha=a)
    total = x[0]
    for v in x[1:]:
        total.add_(v)
    if votes is not None:
        if min(w) > 0:
            votes.clamp_min_(min(w))  # nobody votes: 0 / w
        else:
            votes[votes == 0] = 1
        total.div_(votes)
    return total.mul_(sign)


def combined(b: Block, w: Sequence[float], normalise: bool, elect: bool) -> Tensor:
    """The sum of sparsified differences, with or without an election of signs."""
    if not elect:
        return summed(b.x, w, normalise)
    for v, a in zip(b.x, w, strict=True):
        if a != 1:
            v.mul_(a)
    return elected(b.x, w, normalise)


def bits16(seed: int, purpose: str, b: Block, model: int) -> np.ndarray:
    """16 random bits for every entry of a block, addressed by (seed, purpose, tensor, model, position): Philox by counter."""
    first, skip = divmod(b.start, LANES)
    n = b.x[model].numel()
    key = draws.key(seed, f"{purpose}/{b.site.name}", model)
    source = np.random.Philox(counter=[first, 0, 0, 0], key=[key, 0])
    words = source.random_raw(-(-(n + skip) // 4))
    return words.view(np.uint16)[skip : skip + n]


def gram(b: Block) -> Tensor:
    """(models, models) inner products of a block, fp64."""
    wide = [v.double() for v in b.x]
    n = len(wide)
    out = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(i, n):
            out[i, j] = out[j, i] = torch.dot(wide[i], wide[j])
    return out
