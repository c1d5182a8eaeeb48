from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from temperament.engine.measure import System, content_key
from temperament.engine.pictures import png
from temperament.parts import part
from temperament.protocols import Outcome

ASKED = ("", "a dog", "a house by the sea", "a portrait of a woman", "a red car", "a bowl of fruit", "a city", "a tree")


@dataclass(frozen=True)
class KeepPicturesSkill:
    """Pictures the base made; kept where the tuned model makes of the same noise the same picture."""

    captions: tuple[str, ...]
    made: Any  # (n, 3, H, W), the base's
    spread: float  # mean square between two of them: how unlike another picture is
    seed: int
    name: str = "keep"
    role: str = "retained"
    metric: str = "agreement"
    distance: str | None = None
    how = {"passes": None}  # graded: nothing is simply had or lost

    def key(self) -> str:
        return content_key("keep pictures", self.captions, self.seed, [round(v, 3) for v in self.made.mean((1, 2, 3)).tolist()])

    def some(self, n: int) -> KeepPicturesSkill:
        return KeepPicturesSkill(self.captions[:n], self.made[:n], self.spread, self.seed)

    def measure(self, system: System) -> list[Outcome]:
        pixels = _eighth(system.paint(list(self.captions), _noise(len(self.captions), self.seed))).float() / 255
        apart = (pixels - self.made).square().mean((1, 2, 3))
        kept = (1 - apart / max(self.spread, 1e-12)).clamp(0, 1).tolist()
        return [
            Outcome(f"keep/{i}", self.name, c, "the base's own picture", f"{a**0.5:.3f} away from it", g,
                    extra={"image": png(p), "base": png(b)})
            for i, (c, g, a, p, b) in enumerate(zip(self.captions, kept, apart.tolist(), pixels, self.made, strict=True))
        ]  # fmt: skip


def _noise(n: int, seed: int) -> Tensor:
    """Addresses of noise that no other skill begins with."""
    return torch.arange(n) + ((1 + seed) << 20)


@part("evaluate.keep_pictures", modalities=("image",))
@dataclass(frozen=True)
class KeepPictures:
    """The automatic keep set of a generator: how much of each picture the base makes is still there, from the same noise.

        agreement_i = 1 - |y_i - x_i|^2 / D, cut to 0..1      x_i the base's picture, y_i the tuned model's; D the mean of
                                                              |x_i - x_j|^2 over pairs of the base's

    1 is the same picture, 0 one as unlike as any other: retention on any generator, with no benchmark at hand. It is strict,
    as a picture that is as good but another one counts as lost. The base's pictures are made once and kept in the user's
    cache. Captions whose words the tokenizer does not know are left out, down to no caption at all."""

    items: int = 16  # pictures the base makes
    captions: list[str] = field(default_factory=lambda: list(ASKED))  # in turn
    seed: int = 0  # of the noise

    def __post_init__(self):
        if self.items < 2 or not self.captions:
            raise ValueError("items must be at least 2, and captions name at least one")

    def skills(self, ctx: Any) -> list[KeepPicturesSkill]:
        known = [c for c in self.captions if _known(ctx.base.tokenizer, c)] or [""]
        captions = [known[i % len(known)] for i in range(self.items)]
        paint = lambda: _written(System(ctx.base, seed=ctx.seed).paint(captions, _noise(self.items, self.seed)))
        how = ["keep pictures", captions, self.seed, ctx.seed]
        made = _read(ctx.constant(how, paint) if hasattr(ctx, "constant") else paint())
        return [KeepPicturesSkill(tuple(captions), made, _spread(made), self.seed)]


def _eighth(pixels: Tensor) -> Tensor:
    """Eight bits, as pictures are kept: what the base made is then equal to what it makes again."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def _written(pixels: Tensor) -> dict[str, Any]:
    data = _eighth(pixels).contiguous()
    return {"shape": list(data.shape), "bytes": base64.b64encode(data.numpy().tobytes()).decode()}


def _read(kept: dict[str, Any]) -> Tensor:
    data = torch.frombuffer(bytearray(base64.b64decode(kept["bytes"])), dtype=torch.uint8)
    return data.view(kept["shape"]).float() / 255


def _known(tokenizer: Any, caption: str) -> bool:
    if tokenizer is None:
        return not caption
    unknown = tokenizer.unk_token_id
    ids = tokenizer(caption, add_special_tokens=False)["input_ids"]
    return unknown is None or unknown not in ids


def _spread(pixels: Tensor) -> float:
    """Mean over pairs of the mean square between two pictures: twice the (unbiased) variance of a pixel."""
    return 2 * float(pixels.var(0, unbiased=True).mean())
