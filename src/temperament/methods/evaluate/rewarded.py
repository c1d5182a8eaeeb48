from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from temperament.engine.measure import System, content_key
from temperament.engine.pictures import png
from temperament.errors import UserError
from temperament.methods.evaluate._painted import VarietySkill, painted
from temperament.parts import part, plain
from temperament.protocols import Outcome, PictureReward


@dataclass(frozen=True)
class RewardSkill:
    """Pictures of captions, each with what a reward says of it."""

    name: str
    captions: tuple[str, ...]
    reward: Any
    level: float | None
    role: str = "target"
    metric: str = "reward"
    distance: str | None = None

    @property
    def how(self) -> dict[str, Any]:
        return {"bounds": None, "passes": self.level, "unit": "reward"}

    def key(self) -> str:
        return content_key("rewarded", self.name, self.captions, plain(self.reward))

    def some(self, n: int) -> RewardSkill:
        return replace(self, captions=self.captions[:n])

    @torch.no_grad()
    def measure(self, system: System) -> list[Outcome]:
        pixels = painted(self, system)
        values = self.reward.value(pixels, list(self.captions)).tolist()
        return [
            Outcome(f"{self.name}/{i}", self.name, c, output=f"reward {v:.3f}", score=v, extra={"image": png(p)})
            for i, (c, v, p) in enumerate(zip(self.captions, values, pixels, strict=True))
        ]


@part("evaluate.rewarded", papers=["064"], modalities=("image",))
@dataclass(frozen=True)
class Rewarded:
    """What a reward says of what the model paints, and whether its pictures of one caption have become one picture.

        reward     mean reward of pictures of the captions
        variety    mean distance of two pictures of one caption, root mean square of thumbnails     (DIV, set-level)

    A reward that is trained on is no measure of anything else: look at the pictures, and at the retained skills."""

    reward: PictureReward  # what a picture is worth
    captions: list[str] = field(default_factory=lambda: [""])  # what is painted, in turn
    level: float | None = None  # a picture of this reward counts as right; none: rewards are only averaged
    items: int | None = None  # pictures a skill; default: evaluation.items
    name: str = "reward"  # of the skill
    role: Literal["target", "retained"] = "target"  # what the ledger calls it

    def __post_init__(self):
        if not self.captions:
            raise ValueError("captions must name at least one; an empty one asks for nothing in particular")

    def skills(self, ctx: Any) -> list[Any]:
        if "denoiser" not in ctx.base.components:
            raise UserError("evaluate.rewarded", ctx.base.id, "it makes no pictures; use a diffusion base, e.g. lab/unet")
        n = self.items or ctx.items
        said = tuple(self.captions[i % len(self.captions)] for i in range(n))
        return [RewardSkill(self.name, said, self.reward, self.level, self.role), VarietySkill.of(self.captions, n)]
