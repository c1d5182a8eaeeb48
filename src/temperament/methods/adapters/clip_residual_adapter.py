from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from temperament.delta import Addition
from temperament.engine import see
from temperament.errors import UserError
from temperament.nn import draws
from temperament.nn.pieces import Around, Under
from temperament.parts import part, plain
from temperament.train.trained import Param, Trained


class Bottleneck(Around):
    """h <- (1 - m) h + m relu(W2 relu(W1 h));   W1 (width / reduction, width)."""

    starts_at_zero = False  # its output is mixed in from the first forward on

    def __init__(self, width: int, inner: int, share: float):
        super().__init__()
        self.share = share
        self.down, self.up = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, base: Under, x: Tensor) -> Tensor:
        h, m = base(x), self.strength * self.share
        return h if m == 0 else (1 - m) * h + m * F.relu(self.up(F.relu(self.down(h))))


@part("adapters.clip_residual_adapter", papers=["013"], modalities=("image",))
@dataclass(frozen=True)
class ClipResidual:
    """A small bottleneck behind each encoder of a model of pictures and captions, of whose features a share is replaced.

        h <- (1 - m) h + m relu(W2 relu(W1 h))              m: image for pictures, text for captions; its strength multiplies m

    h (rows, width): features in the common space, before they are brought to length 1. m 0 leaves that encoder alone. It never
    merges and travels as additions. Source: Gao et al. 2021 (CLIP-Adapter); paper 013 (m 0.1 and 0.2, reduction 4).
    """

    image: float = 0.1  # m for pictures
    text: float = 0.2  # m for captions
    reduction: int = 4  # the bottleneck is so many times narrower

    def __post_init__(self):
        if not (0 <= self.image <= 1 and 0 <= self.text <= 1) or self.reduction < 1:
            raise ValueError("image and text must lie in 0..1, reduction be at least 1")

    def build(self, base: Any, ctx: Any) -> Trained:
        model, component = base.model, next(iter(base.components))
        if not see.dual(base) or not all(hasattr(model, f"{side}_projection") for side in ("visual", "text")):
            mend = "it has no two encoders with a projection each; use a CLIP, e.g. lab/clip"
            raise UserError("adapters.clip_residual_adapter", base.id, mend)
        around, params, told = {}, [], plain(self)[type(self).part_name]
        for side, share in (("visual", self.image), ("text", self.text)):
            if share == 0:
                continue
            name = f"{component}/{side}_projection:bottleneck"
            module, piece = self._piece(base, name)
            for key, p in piece.named_parameters():
                spread = (2 / p.shape[1]) ** 0.5
                nn.init.normal_(p, std=spread, generator=draws.generator(ctx.seed, f"{name}/{key}"))
                params.append(Param(f"{name}/{key}", p, key))
            around[name] = (module, piece)
        kept = lambda piece: {k: p.detach().clone() for k, p in piece.named_parameters()}
        return Trained(
            params=params,
            around=around,
            additions=lambda: {n: Addition(type(self).part_name, told, kept(piece)) for n, (_, piece) in around.items()},
        )

    def _piece(self, base: Any, name: str) -> tuple[nn.Module, Bottleneck]:
        component, _, path = name.partition("/")
        side, width = path.partition("_")[0], base.model.config.projection_dim
        piece = Bottleneck(width, max(width // self.reduction, 1), self.image if side == "visual" else self.text)
        module = base.components[component].get_submodule(path.partition(":")[0])
        return module, piece.to(module.weight.device)

    def rebuild(self, base: Any, name: str, addition: Addition) -> tuple[nn.Module, Around]:
        module, piece = self._piece(base, name)
        piece.load_state_dict(dict(addition.tensors))
        return module, piece
