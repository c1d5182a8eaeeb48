from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from temperament.engine import see
from temperament.errors import UserError
from temperament.nn import draws
from temperament.parts import part
from temperament.protocols import Pictured, Progress
from temperament.train.trained import Param, Trained


class Projection(nn.Module):
    """z = W2 relu(W1 h + b1) + b2, on the unit sphere; prototypes (classes, inside): what `nearest` picks of."""

    def __init__(self, inside: int, width: int, prototypes: Tensor | None):
        super().__init__()
        self.map = nn.Sequential(nn.Linear(inside, width), nn.ReLU(), nn.Linear(width, width))
        self.register_buffer("prototypes", prototypes)

    def forward(self, h: Tensor) -> Tensor:
        return nn.functional.normalize(self.map(h), dim=-1)

    @torch.no_grad()
    def nearest(self, h: Tensor) -> Tensor:
        """(rows, inside): to each row the prototype of the largest cosine."""
        if self.prototypes is None:
            mend = "an objective asks for the classes' mean features; name labelled pictures, e.g. data.sprites"
            raise UserError("adapters.projection_head.prototypes", None, mend)
        unit = lambda t: nn.functional.normalize(t, dim=-1)
        return self.prototypes[(unit(h) @ unit(self.prototypes).T).argmax(1)]


@part("adapters.projection_head", papers=["200"], modalities=("image",))
@dataclass(frozen=True)
class ProjectionHead:
    """A small perceptron on the pooled features, for what is compared rather than named; and the classes' mean features.

        z = g(h) / |g(h)|,  g(h) = W2 relu(W1 h + b1) + b2;      prototype_k = mean of h over pictures of class k

    h (rows, inside): pooled features of an image base. The prototypes are those of `prototypes`, a source with labels, as the
    model was when the step began: looked up once, before training, and kept with the step. It serves training alone: it
    changes nothing the model says and is no part of the delta. Source: Chen et al. 2020; with prototypes RMT (paper 200).
    """

    prototypes: Pictured | None = None  # labelled pictures whose classes' mean features are kept; null: none
    width: int = 128  # of z and of the hidden layer
    name: str = "projection"  # how objectives ask for it

    def __post_init__(self):
        if self.width < 1:
            raise ValueError("width must be at least 1")

    @torch.no_grad()
    def prepare(self, base: Any, ctx: Any, batches: Any) -> dict[str, Tensor]:
        if self.prototypes is None:
            return {}
        stream = self.prototypes.open(replace(ctx, live=None, views=None))
        total, device = stream.steps_per_epoch, next(base.model.parameters()).device
        sums = torch.zeros(len(self.prototypes.classes(base)), see.width(base) + 1, dtype=torch.float64)
        for step in range(total):
            rows = stream.batch(step, Progress(step, total))
            # (an epoch's last batch is filled with the next one's first pictures)
            rows = rows.select(((rows.labels >= 0) & (rows.examples < len(stream.pictures))).nonzero()[:, 0])
            h = see.features(base.model, base, rows.pixels.to(device)).double().cpu()
            sums.index_add_(0, rows.labels, torch.cat([h, torch.ones(len(h), 1)], 1))
        seen = sums[sums[:, -1] > 0]
        return {"prototypes": (seen[:, :-1] / seen[:, -1:]).float()}

    def build(self, base: Any, ctx: Any) -> Trained:
        inside, module = see.width(base), base.model
        held = ctx.prepared.get("prototypes")
        if held is None and self.prototypes is not None:  # nobody looked: a check of the formula needs some, not these
            held = torch.randn(2, inside, generator=draws.generator(ctx.seed, f"projection/{self.name}/prototypes"))
        head = Projection(inside, self.width, held)
        for key, p in head.named_parameters():
            spread = 0.0 if key.endswith("bias") else (2 / p.shape[1]) ** 0.5
            nn.init.normal_(p, std=spread, generator=draws.generator(ctx.seed, f"projection/{self.name}/{key}"))
        head.to(next(module.parameters()).device)
        params = [Param(f"head/{self.name}.{n}", p, n, decay=n.endswith("weight")) for n, p in head.named_parameters()]
        return Trained(params=params, heads={self.name: head})
