from __future__ import annotations

from dataclasses import dataclass

from temperament.delta.merging import Blockwise, Site
from temperament.methods.merge._kernels import weighted_sum
from temperament.parts import part


@part("merge.soup_uniform", papers=["120"])
@dataclass(frozen=True)
class UniformSoup(Blockwise):
    """The mean of fine-tunes of one model: W = base + (1/k) sum_i (W_i - base). Costs nothing at inference.

    All must start from the same weights (and head): means of models from different starts fail. Buffers are averaged too, and
    heads for the same classes; `merge.norm_statistics` around it measures the statistics of batch norms again.
    Source: Wortsman et al. 2022, Model soups (paper 120).
    """

    def plan(self, site: Site):
        return lambda b: weighted_sum(b.x, [1 / site.models] * site.models)
