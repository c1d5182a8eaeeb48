"""Linear algebra on weights and activations, deterministic by address."""

from __future__ import annotations

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
    """Flat positions of the k largest entries, ascending; of equals the first come first, so the choice is the same everywhere."""
    flat = scores.reshape(-1)
    if k >= flat.numel():
        return torch.arange(flat.numel(), device=flat.device)
    if k <= 0:
        return torch.zeros(0, dtype=torch.long, device=flat.device)
    edge = flat.kthvalue(flat.numel() - k + 1).values
    above = (flat > edge).nonzero().squeeze(1)
    tied = (flat == edge).nonzero().squeeze(1)[: k - len(above)]
    return torch.cat([above, tied]).sort().values
