from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from temperament.engine import see
from temperament.nn import draws
from temperament.parts import part
from temperament.train.trained import Param, Trained


class MaskPolicy(nn.Module):
    """raw = (f(h), f'(h)), perceptrons of three layers;   Beta(exp a, exp b) with a = calm a0 + (1 - calm) raw_a, b alike.

    a0, b0 (cells,) and the mean cost are running means over steps: they carry no gradient and move after a step, by what it has
    seen (`note`)."""

    def __init__(self, inside: int, width: int, cells: int, calm: float, seed: int):
        super().__init__()
        self.cells, self.calm, self.pending = cells, calm, None
        layer = lambda a, b: nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), nn.ReLU())
        self.a, self.b = (nn.Sequential(layer(inside, width), layer(width, width), nn.Linear(width, cells)) for _ in range(2))
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=p.shape[1] ** -0.5, generator=draws.generator(seed, f"mask_policy/{name}"))
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        begin = draws.uniform(seed, "mask_policy/begin", 0, torch.arange(2), (cells,))
        self.register_buffer("calmed", begin)  # (2, cells): a0, b0
        self.register_buffer("mean", torch.tensor([0.0, 0.0]))  # of the cost, and whether there is one yet

    def forward(self, h: Tensor) -> Tensor:
        """(rows, 2, cells): raw_a, raw_b."""
        return torch.stack([self.a(h), self.b(h)], 1)

    def exponents(self, raw: Tensor) -> Tensor:
        """(rows, 2, cells): a, b. Gradient flows through the small part alone."""
        return self.calm * self.calmed + (1 - self.calm) * raw

    def baseline(self) -> Tensor:
        """The running mean of the cost; in the first step that of its own batch."""
        return self.mean[0] if self.mean[1] or self.pending is None else self.pending[1]

    def note(self, raw: Tensor, cost: Tensor) -> None:
        self.pending = (raw.detach().mean(0), cost.detach().mean())

    def move(self) -> None:
        if self.pending is not None:
            raw, cost = self.pending
            self.calmed.lerp_(raw.to(self.calmed), 0.01)
            self.mean.copy_(torch.stack([self.mean[0].lerp(cost.to(self.mean), 0.1) if self.mean[1] else cost, torch.ones(())]))
            self.pending = None


@part("adapters.mask_policy", papers=["260"], modalities=("image",))
@dataclass(frozen=True)
class MaskPolicyHead:
    """A player that decides, picture by picture, which of its cells shall be dark: two small perceptrons on pooled features.

        m_j ~ Beta(exp a_j, exp b_j);   a = calm a0 + (1 - calm) f(h),  b alike;   a0 <- 0.99 a0 + 0.01 mean over rows f(h)

    h (rows, width): features of the base as this player has it, so beside a selection or an adapter the trunk is its own too.
    a0, b0 begin uniform in 0..1. LayerNorm stands where the paper has BatchNorm, so that no row depends on another. For a
    player beside the one that learns to classify (objectives.classify.noise_mask), trained by objectives.policy.noise_mask; it
    changes nothing the model says and is no part of the delta. Source: paper 260 (grid 64, calm 0.9).
    """

    grid: int = 64  # cells of a side of the mask
    width: int = 128  # hidden units of each of two layers
    calm: float = 0.9  # share of the running means
    name: str = "mask"  # how objectives ask for it

    def __post_init__(self):
        if self.grid < 1 or self.width < 1 or not 0 <= self.calm < 1:
            raise ValueError("grid and width must be at least 1, calm in [0, 1)")

    def build(self, base: Any, ctx: Any) -> Trained:
        head = MaskPolicy(see.width(base), self.width, self.grid**2, self.calm, ctx.seed)
        head.to(next(base.model.parameters()).device)

        def load(state: dict[str, Tensor]) -> None:
            head.calmed.copy_(state["calmed"]), head.mean.copy_(state["mean"])

        params = [Param(f"head/{self.name}.{n}", p, n, decay=p.dim() > 1) for n, p in head.named_parameters()]
        return Trained(
            params=params,
            heads={self.name: head},
            after_step=lambda progress: head.move(),
            state=lambda: {"calmed": head.calmed.clone(), "mean": head.mean.clone()},
            load=load,
        )
