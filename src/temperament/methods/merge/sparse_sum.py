from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from temperament.delta import Delta, Dense, Lazy, Sparse
from temperament.delta.merge_run import in_memory
from temperament.delta.merging import Blockwise, Site
from temperament.delta.selection import keep_from, kth_largest
from temperament.errors import UserError
from temperament.methods.merge._kernels import weighted_sum
from temperament.parts import part


@part("merge.sparse_sum", papers=["011"])
@dataclass(frozen=True)
class SparseSum(Blockwise):
    """Sparse changes of one base added: theta_0 + sum_i w_i phi_i; each phi kept to its K largest entries over all tensors.

        K = density * (entries of all tensors that some model changed);  density 1 keeps what there is (a lottery ticket)

    Changes that hardly share entries do not disturb each other: a language and a task, say. What is left stays sparse, in
    memory and on disk; entries equal to the K-th are all kept. Source: Ansell et al. 2022, Composable Sparse Fine-Tuning
    (paper 011).
    """

    weights: list[Any] = field(default_factory=list)  # one a model; empty: 1 each
    density: float = 1.0  # share of all entries that a model keeps

    def __post_init__(self):
        if not 0 < self.density <= 1:
            raise ValueError(f"density lies in (0, 1], not {self.density}")

    def survey(self, sites: list[Site]):
        if self.density >= 1 or not sites:
            return [0.0] * (sites[0].models if sites else 0)
        total = sum(site.numel for site in sites)
        counts = [max(1, int(self.density * total))] * sites[0].models
        return (yield from kth_largest(max(sum(len(s.spans()) for s in sites), 2), total, counts))

    def plan(self, site: Site):
        w = site.each(self.weights, "weights")

        def combine(b):
            for v, cut in zip(b.x, site.state, strict=True):
                keep_from(v, cut)
            return weighted_sum(b.x, w)

        return combine

    def merge(self, base: Any, deltas: Sequence[Delta]) -> Delta:
        for d in deltas:
            if d.additions:
                raise UserError("addition", min(d.additions), "a sparse sum is of changes to base tensors; restrict the delta")
        merged = in_memory(self, base, deltas)

        def stored(name: str):
            change = merged.changes[name]
            few = isinstance(change, Dense) and int(torch.count_nonzero(change.d)) * 2 < change.d.numel()
            return Sparse.of(change.d) if few else change

        changes = Lazy(merged.changes, stored)
        changes = changes if isinstance(merged.changes, Lazy) else dict(changes)
        return Delta(changes, {}, merged.buffers, merged.base)
