from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from temperament.parts import number, part


@part("optim.sgd")
@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent, with momentum when asked: b <- mu b + g;  W <- W - lr b."""

    lr: float = 1e-2  # learning rate; may be a schedule
    momentum: float = 0.0  # mu
    weight_decay: float = 0.0  # added to the gradient: decay * W

    def __post_init__(self):
        if number(self.lr, 0.0) < 0:
            raise ValueError("lr must not be negative")
        if not 0 <= self.momentum < 1:
            raise ValueError("momentum must lie in [0, 1)")
        if self.weight_decay < 0:
            raise ValueError("weight_decay must not be negative")

    def build(self, parameters: list[Any], ctx: Any) -> torch.optim.Optimizer:
        groups = [
            {
                "params": [p.tensor],
                "lr_factor": p.lr_factor,
                "weight_decay": self.weight_decay if p.decay and len(p.shape) > 1 else 0.0,
            }
            for p in parameters
        ]
        return torch.optim.SGD(groups, lr=0.0, momentum=self.momentum)
