from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from temperament.bases.worlds import sprites
from temperament.engine.measure import System, content_key
from temperament.engine.pictures import png
from temperament.errors import UserError
from temperament.methods.evaluate._painted import painted
from temperament.parts import part
from temperament.protocols import Outcome

WANTED = ("shape", "colour", "place")


@dataclass(frozen=True)
class RenderSkill:
    """Pictures of captions, each with noise of its own; right if the world's eye sees what was asked."""

    name: str
    scenes: tuple[sprites.Scene, ...]
    role: str = "retained"
    wanted: tuple[str, ...] = WANTED
    metric: str = "exact"
    distance: str | None = None
    how: dict[str, Any] = field(default_factory=dict)

    @property
    def captions(self) -> list[str]:
        return [s.caption() for s in self.scenes]

    def key(self) -> str:
        return content_key("renders", self.name, self.wanted, self.captions)

    def some(self, n: int) -> RenderSkill:
        return replace(self, scenes=self.scenes[:n])

    def measure(self, system: System) -> list[Outcome]:
        pixels = painted(self, system)
        seen = sprites.recognise(pixels.numpy())
        return [self._outcome(i, *row) for i, row in enumerate(zip(self.scenes, pixels, seen, strict=True))]

    def _outcome(self, i: int, asked: sprites.Scene, pixels: torch.Tensor, seen: tuple[sprites.Scene, float]) -> Outcome:
        want, got = sprites.factors(asked), sprites.factors(seen[0])
        right = all(want[k] == got[k] for k in self.wanted)
        extra = {"image": png(pixels), "away": round(seen[1], 4)}
        return Outcome(
            f"{self.name}/{i}", self.name, asked.caption(), asked.caption(), seen[0].caption(), float(right), extra=extra
        )


@part("evaluate.renders", modalities=("image",))
@dataclass(frozen=True)
class Renders:
    """Does a generator of the sprite world paint what it is asked? One skill a shape; captions no training picture had.

    A picture is right if the nearest of all scenes has the shape, the colour and the place that were asked for; what it
    shows, and how far it is from that scene, goes into the ledger with the picture itself."""

    wanted: list[str] = field(default_factory=lambda: list(WANTED))  # factors that must be right: also texture, background
    shapes: list[str] = field(default_factory=list)  # skills; empty: all shapes
    items: int | None = None  # captions a skill; default: evaluation.items
    seed: int = 0  # which captions

    def __post_init__(self):
        known = ("shape", "colour", "texture", "place", "background")
        if wrong := [w for w in self.wanted if w not in known] or [s for s in self.shapes if s not in sprites.SHAPES]:
            raise ValueError(
                f"{wrong[0]!r} is unknown; wanted are of {', '.join(known)}; shapes of {', '.join(sprites.SHAPES)}"
            )

    def skills(self, ctx: Any) -> Sequence[RenderSkill]:
        if "denoiser" not in ctx.base.components:
            raise UserError("evaluate.renders", ctx.base.id, "this base makes no pictures; use a diffusion base, e.g. lab/unet")
        names, n = self.shapes or list(sprites.SHAPES), self.items or ctx.items
        made = [sprites.scenes("test", n, self.seed, shapes=(name,)) for name in names]
        return [RenderSkill(k, tuple(s), wanted=tuple(self.wanted)) for k, s in zip(names, made, strict=True)]
