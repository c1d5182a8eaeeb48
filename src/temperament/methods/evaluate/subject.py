from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from temperament.engine.measure import System, content_key
from temperament.engine.pictures import png, size_of
from temperament.errors import UserError
from temperament.methods.evaluate._painted import VarietySkill, painted
from temperament.parts import build, part, plain
from temperament.protocols import Aide, Gallery, Outcome


@dataclass(frozen=True)
class SubjectSkill:
    """Pictures of captions, compared with those of the subject by the features of an aide."""

    name: str
    captions: tuple[str, ...]
    shown: Any  # the subject's pictures, (n, 3, H, W); they are part of the key by their sum
    aide: Any
    role: str
    metric: str
    sign: int = 1  # 1: like the subject; -1: unlike it
    distance: str | None = None

    @property
    def how(self) -> dict[str, Any]:
        return {"passes": 0.5 if getattr(self.aide, "sure", False) else None}

    def key(self) -> str:
        shown = content_key(self.shown.flatten().tolist()) if isinstance(self.shown, Tensor) else ""
        return content_key("subject", self.name, self.captions, shown, plain(self.aide), self.sign)

    def some(self, n: int) -> SubjectSkill:
        return replace(self, captions=self.captions[:n])

    def measure(self, system: System) -> list[Outcome]:
        pixels = painted(self, system)
        like = (self.aide.ask(pixels) @ self.aide.ask(self.shown).T).mean(1).clamp(0, 1)
        score = like if self.sign > 0 else 1 - like
        wanted = "the subject" if self.sign > 0 else "others of its class"
        return [
            Outcome(f"{self.name}/{i}", self.name, c, wanted, f"likeness {float(x):.2f}", float(s), extra={"image": png(p)})
            for i, (c, x, s, p) in enumerate(zip(self.captions, like, score, pixels, strict=True))
        ]


@part("evaluate.subject", papers=["274"], modalities=("image",))
@dataclass(frozen=True)
class SubjectSuite:
    """Was a subject learnt, and what did its class lose by it: fidelity, drift and variety of what the model paints.

        subject    mean likeness of pictures of the subject's captions to the subject's own pictures      (DINO, CLIP-I)
        class      1 - the same of pictures of the class: what does not drift to the subject          (1 - PRES)
        variety    mean distance of two pictures of one class caption, root mean square of thumbnails  (DIV, set-level)

    Likeness is the cosine of the features of an aide, 0 where negative, averaged over the subject's pictures. Every picture
    goes into the ledger with its caption. Captions are those of the subject's pictures unless others are given.
    Source: Ruiz et al. 2023, DreamBooth (paper 274); variety by 8 x 8 thumbnails in place of LPIPS."""

    of: Gallery  # the subject: a source of its pictures, or the data.prior_preservation around one
    prior: list[str] = field(default_factory=list)  # captions of the class; none: drift and variety are not measured
    captions: list[str] = field(default_factory=list)  # of the subject, in new settings; {identifier} and {noun} are filled in
    features: Aide | None = None  # whose eyes: aides.encoder, aides.sprite_eye; none: aides.pixels
    items: int | None = None  # pictures a skill; default: evaluation.items
    name: str = "subject"  # of the target skill
    role: Literal["target", "retained"] = "target"  # what the ledger calls it

    def skills(self, ctx: Any) -> list[Any]:
        if "denoiser" not in ctx.base.components:
            raise UserError("evaluate.subject", ctx.base.id, "this base makes no pictures; use a diffusion base, e.g. lab/unet")
        aide = self.features or build("aides.pixels")
        if getattr(aide, "role", "") != "features":
            mend = "it gives no features of pictures; use aides.pixels, aides.encoder or aides.sprite_eye"
            raise UserError("evaluate.subject.features", type(aide).part_name, mend)
        shown = self.of.pictures(ctx)
        pixels = torch.stack([p.pixels(size_of(ctx.base)) for p in shown])
        fill = getattr(self.of, "filled", lambda caption, base: caption)
        asked = [fill(c, ctx.base) for c in self.captions] or list(dict.fromkeys(p.caption for p in shown))
        n = self.items or ctx.items
        in_turn = lambda said: tuple(said[i % len(said)] for i in range(n))
        made = [SubjectSkill(self.name, in_turn(asked), pixels, aide, self.role, "fidelity")]
        if self.prior:
            prior = [fill(c, ctx.base) for c in self.prior]
            made.append(SubjectSkill("class", in_turn(prior), pixels, aide, "retained", "1 - PRES", sign=-1, distance="near"))
            made.append(VarietySkill.of(prior, n))
        return made
