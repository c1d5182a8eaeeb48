from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from temperament.parts import number, part


@part("optim.adamw")
@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay.

        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  W <- W - lr (m^ / (sqrt(v^) + eps) + decay * W)

    Norms and biases are not decayed. Moments are kept in the dtype of the trained tensor (fp32 master weights: fp32 moments).
    Source: Loshchilov and Hutter 2019; the step is torch's fused kernel.
    """

    lr: float = 2e-5  # learning rate; may be a schedule
    betas: tuple[float, float] = (0.9, 0.999)  # decay of the first and second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.0  # decoupled decay of matrices, times lr

    def __post_init__(self):
        if number(self.lr, 0.0) < 0:
            raise ValueError("lr must not be negative")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError("betas must lie in [0, 1)")
        if self.eps <= 0:
            raise ValueError("eps must be above 0")
        if self.weight_decay < 0:
            raise ValueError("weight_decay must not be negative")

    def build(self, parameters: list[Any], ctx: Any) -> torch.optim.Optimizer:
        groups: dict[tuple, dict] = {}
        for p in parameters:
            key = (p.lr_factor, p.decay and len(p.shape) > 1)
            group = groups.setdefault(
                key, {"params": [], "lr_factor": key[0], "weight_decay": self.weight_decay if key[1] else 0.0}
            )
            group["params"].append(p.tensor)
        return torch.optim.AdamW(list(groups.values()), lr=0.0, betas=self.betas, eps=self.eps, fused=True)
