from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch

from temperament.delta.merging import Blockwise, Gather, Site
from temperament.methods.merge._kernels import gram, weighted_sum
from temperament.parts import part


@part("merge.model_stock")
@dataclass(frozen=True)
class ModelStock(Blockwise):
    """The point between base and mean of the models that is nearest to the centre their fine-tunes scatter around.

        W = base + t * mean_i(W_i - base),    t = N c / (1 + (N - 1) c),    c = mean cosine between pairs of differences

    Different fine-tunes of one task lie on a shell; their angle tells how far in the centre is. No weights, no data.
    Source: Jang et al. 2024, Model Stock.
    """

    by: Literal["tensor", "row"] = "tensor"  # one t a tensor, or one a row (output unit)

    fewest = 2

    @property
    def grain(self):
        return "element" if self.by == "tensor" else "row"

    def plan(self, site: Site):
        n = site.models
        pairs = list(combinations(range(n), 2))
        if self.by == "row":

            def by_row(b):
                rows = torch.stack([v.view(-1, site.row) for v in b.x])
                lengths = rows.norm(dim=-1)
                cosine = torch.stack(
                    [((rows[i] * rows[j]).sum(-1) / (lengths[i] * lengths[j]).clamp_min(1e-30)).clamp(-1, 1) for i, j in pairs]
                ).mean(0)
                return (rows.mean(0) * ratio(cosine, n)[:, None]).view(-1)

            return by_row
        G = sum((yield Gather(gram)))
        lengths = G.diagonal().sqrt()
        cosine = torch.stack([(G[i, j] / (lengths[i] * lengths[j]).clamp_min(1e-30)).clamp(-1, 1) for i, j in pairs]).mean()
        t = float(ratio(cosine, n))
        return lambda b: weighted_sum(b.x, [t / n] * n)


def ratio(cosine: torch.Tensor, n: int) -> torch.Tensor:
    """t; 0 where the differences oppose each other so that no centre exists."""
    below = 1 + (n - 1) * cosine
    singular = below.abs() < 1e-6
    return torch.where(singular, 0.0, n * cosine / torch.where(singular, 1.0, below))
