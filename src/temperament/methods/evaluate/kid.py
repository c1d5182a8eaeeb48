from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from temperament.engine.discrepancy import gram, weighted
from temperament.engine.measure import System, content_key
from temperament.engine.pictures import png, size_of
from temperament.errors import UserError
from temperament.methods.evaluate._painted import painted
from temperament.parts import build, part, plain
from temperament.protocols import Aide, Outcome, Source


@dataclass(frozen=True)
class KidSkill:
    """Pictures of captions as a set, against a set of real ones."""

    name: str
    captions: tuple[str, ...]
    real: Tensor  # (n, 3, H, W)
    aide: Any
    role: str
    metric: str = "KID"
    distance: str | None = None
    how: dict[str, Any] = field(default_factory=lambda: {"higher_is_better": False, "unit": "MMD\u00b2"})

    def key(self) -> str:
        return content_key("kid", self.name, self.captions, self.real.flatten().tolist(), plain(self.aide))

    def some(self, n: int) -> KidSkill:
        return replace(self, captions=self.captions[:n])

    def measure(self, system: System) -> list[Outcome]:
        pixels = painted(self, system)
        with torch.no_grad():
            seen = self.aide.ask(pixels)
        return [
            Outcome(f"{self.name}/{i}", self.name, c, extra={"image": png(p), "seen": [round(v, 6) for v in f.tolist()]})
            for i, (c, p, f) in enumerate(zip(self.captions, pixels, seen, strict=True))
        ]

    def of_set(self, outcomes: Sequence[Outcome]) -> Callable[[np.ndarray], float]:
        x = torch.tensor([o.extra["seen"] for o in outcomes])
        with torch.no_grad():
            y = self.aide.ask(self.real)
        known = gram(x, x), gram(y, y), gram(x, y)

        def value(rows: np.ndarray) -> float:
            return float(weighted(*known, torch.from_numpy(np.bincount(rows, minlength=len(x))).double()))

        return value


@part("evaluate.kid", papers=["054"], modalities=("image",))
@dataclass(frozen=True)
class Kid:
    """Are painted pictures distributed like real ones? One number for the whole set, with its bootstrap; less is better.

        KID = MMD^2( phi(painted), phi(real) ), k(u, v) = (<u, v> / d + 1)^3, unbiased (engine/discrepancy.py)

    Captions and real pictures are those the source holds out, or all of its. The interval is over painted pictures, the real
    ones held. Features should be others than any that were trained on. Source: Binkowski et al. 2018; used for paper 054."""

    of: Source  # where real pictures and their captions come from
    said: bool = True  # paint what the captions say; false: the model without captions, which has more to get wrong
    features: Aide | None = None  # whose eyes: aides.encoder; none: aides.random_features with a seed of its own
    items: int | None = None  # pictures that are painted; default: evaluation.items
    name: str = "kid"  # of the skill
    role: Literal["target", "retained"] = "retained"  # what the ledger calls it

    def skills(self, ctx: Any) -> list[KidSkill]:
        if "denoiser" not in ctx.base.components:
            raise UserError("evaluate.kid", ctx.base.id, "this base makes no pictures; use a diffusion base, e.g. lab/unet")
        known = self.of.held(ctx.base) if hasattr(self.of, "held") else getattr(self.of, "pictures", lambda ctx: [])(ctx)
        if len(known) < 2:
            mend = "it holds no pictures to compare with; use data.sprites or data.folder_images"
            raise UserError("evaluate.kid.of", type(self.of).part_name, mend)
        n = self.items or ctx.items
        real = torch.stack([p.pixels(size_of(ctx.base)) for p in known[: max(2 * n, 200)]])
        aide = self.features or build({"aides.random_features": {"seed": 1}})
        asked = tuple(known[i % len(known)].caption if self.said else "" for i in range(n))
        return [KidSkill(self.name, asked, real, aide, self.role)]
