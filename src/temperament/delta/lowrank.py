"""Changes as low rank: exactly, where the expression allows it, or the best approximation of a dense difference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from temperament.delta.change import Change, LowRank
from temperament.delta.combined import Masked, Rows, Sum
from temperament.delta.delta import Delta
from temperament.delta.golomb import CodedLowRank
from temperament.errors import UserError


def as_low_rank(change: Change) -> LowRank | None:
    """The same difference as one LowRank (to the rounding of a scale), or None where it is not one.

    Sums concatenate ranks; a change of some rows has zero rows in B elsewhere; a mask of whole rows zeroes rows of B.
    """
    if isinstance(change, LowRank):
        return change
    if isinstance(change, CodedLowRank):
        return change.plain()
    if isinstance(change, Sum):
        terms = [as_low_rank(term) for term in change.changes]
        if any(term is None or term.layout != terms[0].layout for term in terms):
            return None
        scale = terms[0].scale or 1.0
        factors = [term.B * (term.scale / scale) for term in terms]
        return LowRank(
            torch.cat([term.A for term in terms]), torch.cat(factors, dim=1), terms[0].layout, scale=scale * change.scale
        )
    if not isinstance(change, Rows | Masked) or (inner := as_low_rank(change.change)) is None or inner.layout != "linear":
        return None
    if isinstance(change, Rows):
        B = inner.B.new_zeros(change.shape[0], inner.rank).index_copy(0, change.rows, inner.B)
    elif change.mask.shape[1:].numel() == 1 and change.mask.shape[0] in (1, inner.B.shape[0]):
        B = inner.B * change.mask.flatten(1).to(inner.B.dtype)
    else:
        return None
    return replace(inner, B=B, scale=inner.scale * change.scale)


def truncated(difference: Tensor, rank: int | None = None, error: float | None = None) -> LowRank:
    """The closest LowRank (Frobenius; Eckart-Young) of `rank`, or the smallest whose relative error is at most `error`.

    difference (out, in, *kernel); the singular values are shared evenly, so that A and B are of one size.
    """
    assert (rank is None) != (error is None), "one of rank and error"
    U, S, V = torch.linalg.svd(difference.double().flatten(1), full_matrices=False)
    if rank is None:
        left = S.square().flip(0).cumsum(0).flip(0)  # left[k] = squared error of rank k
        rank = max(1, int((left > (error**2) * left[0]).sum())) if len(S) else 1
    root = S[:rank].sqrt()
    A = (root[:, None] * V[:rank]).reshape(-1, *difference.shape[1:])
    return LowRank(A.to(difference.dtype).contiguous(), (U[:, :rank] * root).to(difference.dtype).contiguous())


def to_low_rank(
    delta: Delta, rank: int | None = None, error: float | None = None, base: Mapping[str, Tensor] | None = None
) -> Delta:
    """Every change of a matrix or convolution as LowRank of this rank or relative error; vectors stay as they are.

    What is low rank already, and within `rank`, is kept as it is. `base` is read where a change needs the weight.
    """
    if (rank is None) == (error is None) or (rank is not None and rank < 1) or not 0 < (error or 0.5) < 1:
        raise UserError("rank, error", f"{rank}, {error}", "give a rank of at least 1, or a relative error between 0 and 1")

    def made(name: str) -> Change:
        change = delta.change(name)
        exact = as_low_rank(change)
        if exact is not None and (rank is None or exact.rank <= rank):
            return exact
        assert base is not None or not change.needs_weight, f"{name} is a function of the base weight: pass base"
        difference = change.delta(base[name] if change.needs_weight else None)
        return change if difference.dim() < 2 else truncated(difference, rank, error)

    return replace(delta.baked(), changes={name: made(name) for name in sorted(delta.changes)})
