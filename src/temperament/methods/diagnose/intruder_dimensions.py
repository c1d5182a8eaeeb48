from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from temperament.parts import part


@part("diagnose.intruder_dimensions", papers=["018"])
@dataclass(frozen=True)
class IntruderDimensions:
    """New high-ranking singular directions of a tuned weight that the base did not have.

        W0 = U0 S0 V0^T, W = U S V^T;   m_j = max_i |<u_j, u0_i>| over all left singular vectors of W0
        u_j, j <= k, is an intruder when m_j < eps

    Reported for every changed matrix: the count, the ranks at which they stand, their singular values, the effective rank of
    the change exp(entropy of its normalised singular values), and its relative norm |W - W0| / |W0|. Where W0 has fewer columns
    than rows its left vectors do not span the space, and what lies outside counts as new. Source: Shuttleworth et al. 2024
    (paper 018).
    """

    k: int = 10  # leading directions of the tuned weight that are looked at
    eps: float = 0.5  # below this overlap with every base direction it is an intruder
    targets: list[str] = field(default_factory=lambda: ["all-linear"])  # which matrices

    @torch.no_grad()
    def diagnose(self, subject: Any) -> dict[str, Any]:
        base, delta = subject.base, subject.delta
        wanted = {p.parameters["weight"]: p for p in base.places.match(list(self.targets)) if "weight" in p.parameters}
        known, rows = dict(base.parameters()), []
        for name in sorted(delta.changes):
            if name not in wanted or known[name].dim() != 2:
                continue
            place = wanted[name]
            W0 = base.originals.get(name, known[name].detach()).cpu().float()
            W = delta.change(name).apply(W0)
            W0, W = (t.T if place.transposed else t for t in (W0, W))
            overlap, values = overlaps(W0, W, self.k)
            found = (overlap < self.eps).nonzero()[:, 0].tolist()
            change = torch.linalg.svdvals(W - W0)
            rows.append(
                {
                    "place": place.name,
                    "role": place.role,
                    "stack": place.stack,
                    "depth": place.depth,
                    "count": len(found),
                    "ranks": found,
                    "singular_values": [float(values[j]) for j in found],
                    "overlap": [round(float(m), 4) for m in overlap],
                    "effective_rank": effective_rank(change),
                    "relative_norm": float((W - W0).norm() / W0.norm().clamp(min=1e-30)),
                }
            )
        return {"intruders": sum(r["count"] for r in rows), "matrices": len(rows), "k": self.k, "eps": self.eps, "rows": rows}


def overlaps(W0: Tensor, W: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(k,) largest |cosine| of each leading left singular vector of W with those of W0, and (k,) its singular values."""
    U0 = torch.linalg.svd(W0, full_matrices=False).U
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    k = min(k, U.shape[1])
    return (U[:, :k].T @ U0).abs().amax(1), S[:k]


def effective_rank(singular: Tensor) -> float:
    """exp of the entropy of the normalised singular values; 0 for no change."""
    total = singular.sum()
    if total == 0:
        return 0.0
    p = singular / total
    return float(torch.exp(-(p * torch.log(p.clamp(min=1e-30))).sum()))
