from __future__ import annotations

from dataclasses import dataclass

import torch

from temperament.delta.merging import Block, Blockwise, Site
from temperament.parts import part


@part("merge.scale_intruders", papers=["018"])
@dataclass(frozen=True)
class ScaleIntruders(Blockwise):
    """Directions a fine-tune has put high into a matrix, unlike any of the base's, are damped: knowledge returns, the task
    mostly stays.

        W = U S V^T;  u_j, j <= k, is an intruder when max_i |<u_j, u0_i>| < eps over the left singular vectors of the base
        W' = W + (factor - 1) * sum_{intruders} s_j u_j v_j^T

    factor 1 is the tuned model, 0 removes them, 0.7-0.9 trades. Needs whole matrices and two SVDs of each. Tensors that are
    no matrices keep their change. Matrices are read as they are stored: of GPT-2's Conv1D, (in, out), u are directions of the
    input, where diagnose.intruder_dimensions looks at those of the output. Source: Shuttleworth et al. 2024, LoRA vs Full
    Fine-tuning (paper 018).
    """

    grain = "tensor"
    fewest = most = 1

    factor: float = 0.75  # of the intruders' singular values
    k: int = 10  # leading directions that are looked at
    eps: float = 0.5  # below this overlap with every base direction it is an intruder

    def plan(self, site: Site):
        if len(site.shape) != 2 or min(site.shape) < 2 or self.factor == 1:
            return lambda b: b.x[0]

        def combine(b: Block):
            W0 = b.base.view(site.shape)
            W = W0 + b.x[0].view(site.shape)
            U0 = torch.linalg.svd(W0, full_matrices=False).U
            U, S, V = torch.linalg.svd(W, full_matrices=False)
            k = min(self.k, len(S))
            new = ((U[:, :k].T @ U0).abs().amax(1) < self.eps).nonzero()[:, 0]
            damped = (U[:, new] * S[new]) @ V[new]
            return b.x[0].add_(damped.reshape(-1), alpha=self.factor - 1)

        return combine
