"""Linear algebra on weights and activations, deterministic by address."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from temperament.nn import draws

EXACT = 2048  # smaller side up to which a whole SVD is cheaper than it is worth avoiding


@torch.no_grad()
def singular(weight: Tensor, rank: int, seed: int = 0, address: str = "", power: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triples U (m, r), S (r,), V (n, r) of a matrix (m, n), in fp32 or wider.

    Exact where it is affordable; else randomised: rank 2 r, `power` iterations, the random start drawn by address.
    Source: Halko, Martinsson, Tropp 2011.
    """
    W = weight if weight.dtype == torch.float64 else weight.float()
    rank = min(rank, *W.shape)
    if min(W.shape) <= max(EXACT, 4 * rank):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank].T
    start = torch.randn(W.shape[1], 2 * rank, generator=draws.generator(seed, f"svd/{address}")).to(W)
    Q = torch.linalg.qr(W @ start).Q
    for _ in range(power):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return (Q @ U)[:, :rank], S[:rank], Vh[:rank].T


@torch.no_grad()
def largest(scores: Tensor, k: int) -> Tensor:
    """Flat positions of the k largest entries, ascending; of equals the first, so the choice is the same everywhere."""
    flat = scores.reshape(-1)
    if k >= flat.numel():
        return torch.arange(flat.numel(), device=flat.device)
    if k <= 0 or flat.device.type == "meta":  # (of shapes without numbers: that there are k)
        return torch.zeros(max(k, 0), dtype=torch.long, device=flat.device)
    edge = flat.kthvalue(flat.numel() - k + 1).values
    above = (flat > edge).nonzero().squeeze(1)
    tied = (flat == edge).nonzero().squeeze(1)[: k - len(above)]
    return torch.cat([above, tied]).sort().values


def rows_of(chosen: Tensor, one: int, of: int) -> tuple[Tensor, Tensor]:
    """(rows, slots) in which `one` of so many was chosen, from chosen (n, k); of shapes without numbers an even share."""
    if chosen.device.type == "meta":
        share = torch.zeros(-(-chosen.numel() // of), dtype=torch.long, device=chosen.device)
        return share, share
    return (chosen == one).nonzero(as_tuple=True)


def largest_of_all(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """The same over several tensors together: flat positions in each, of tensors in the order of their names."""
    names = sorted(scores)
    flat = torch.cat([scores[n].reshape(-1).float() for n in names])
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[largest(flat, k)] = True
    pieces = chosen.split([scores[n].numel() for n in names])
    return {n: piece.nonzero()[:, 0] for n, piece in zip(names, pieces, strict=True)}


class IncrementalPCA:
    """Principal components of rows that come in batches, without keeping them: exact while no more than `keep` are needed.

        mean    of all rows so far          components (k, d), values (k,): right singular triples of the centred rows

    The old rows enter the next decomposition as S V^T, the move of the mean as one more row. Source: Ross et al. 2008.
    """

    def __init__(self, keep: int):
        self.keep, self.n = keep, 0
        self.mean = self.square = self.components = self.values = None

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """rows (m, d)."""
        X, m = rows.detach().double(), len(rows)
        if m == 0:
            return
        mean = X.mean(0)
        centred = X - mean
        if self.n == 0:
            stack, self.mean, self.square = centred, mean, (centred**2).sum(0)
        else:
            share = self.n * m / (self.n + m)
            apart = self.mean - mean
            stack = torch.cat([self.values[:, None] * self.components, centred, (share**0.5 * apart)[None]])
            self.square = self.square + (centred**2).sum(0) + share * apart**2
            self.mean = (self.n * self.mean + m * mean) / (self.n + m)
        self.n += m
        _, S, Vh = torch.linalg.svd(stack, full_matrices=False)
        V, S = Vh[: self.keep], S[: self.keep]
        at = V.abs().argmax(1, keepdim=True)
        self.components, self.values = V * V.gather(1, at).sign(), S  # the largest entry of a component is positive

    @property
    def explained(self) -> Tensor:
        """(k,) share of the variance of all rows that each component holds; of rows that are all alike, 0."""
        total = self.square.sum()
        return self.values**2 / total if total > 0 else torch.zeros_like(self.values)


@torch.no_grad()
def rotation(X: Tensor, Y: Tensor) -> Tensor:
    """R (d, d), det R = +1, that brings the rows of X (n, d) nearest to those of Y:  min over rotations of |X R^T - Y|.

    X^T Y = U S V^T,    R = V diag(1, ..., 1, det(V U^T)) U^T. Source: Kabsch 1976; Schoenemann 1966 without the sign.
    """
    U, _, Vh = torch.linalg.svd(X.double().T @ Y.double())
    sign = torch.ones(len(U), dtype=U.dtype, device=U.device)
    sign[-1] = torch.linalg.det(Vh.T @ U.T).sign()
    return ((Vh.T * sign) @ U.T).to(X)
