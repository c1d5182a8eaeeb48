from __future__ import annotations

from dataclasses import dataclass

import torch

from temperament.delta.merging import Block, Blockwise, Gather, Setting, Site, Total
from temperament.delta.selection import largest
from temperament.methods.merge._ranges import shares
from temperament.parts import part


@part("merge.sce")
@dataclass(frozen=True)
class SCE(Blockwise):
    """Select, calculate, erase: entries on which the models differ most, weighted by each model's energy, of one sign.

        select     of each tensor the entries whose variance over the models is largest (density of those that vary), else 0
        calculate  w_i = mean(t_i^2) / sum_j mean(t_j^2)
        erase      only entries of the sign of sum_i t_i;   W = base + sum_i w_i t_i / sum_i w_i over those left

    Source: Wan et al. 2024, FuseChat (SCE).
    """

    density: Setting = 1.0  # share of the varying entries that is selected

    def __post_init__(self):
        shares(density=self.density)

    def plan(self, site: Site):
        density, cut = site.one(self.density, "density"), 0.0
        if density <= 0:
            return lambda b: torch.zeros_like(b.x[0])
        if density < 1:
            (varying,) = yield Total(lambda b: [variance(b)[0].count_nonzero().numpy()[None].copy()])
            (cut,) = yield from largest(site, [int(int(varying[0]) * density)], variance)

        def select(b: Block):
            if cut == float("inf"):
                return [torch.zeros_like(v) for v in b.x]
            return b.x if cut <= 0 else [v * (variance(b)[0] >= cut) for v in b.x]

        energy = sum((yield Gather(lambda b: torch.tensor([float(v.square().sum(dtype=torch.float64)) for v in select(b)]))))
        mean = energy / site.numel
        w = (mean / mean.sum() if float(mean.sum()) >= 1e-6 else torch.full_like(mean, 1 / site.models)).tolist()

        def combine(b: Block):
            x = select(b)
            sign = sum(x).add(1e-45).sign_()
            total, votes = torch.zeros_like(sign), torch.zeros_like(sign)
            for v, a in zip(x, w, strict=True):
                agree = (v * sign).clamp_min_(0)
                total.add_(agree, alpha=a)
                votes.add_(agree.sign_(), alpha=a)
            return total.div_(votes.clamp_min_(1e-6)).mul_(sign)

        return combine


def variance(b: Block) -> list[torch.Tensor]:
    """Of every entry over the models, divided by their number."""
    return [torch.stack(b.x).float().var(dim=0, unbiased=False)]
