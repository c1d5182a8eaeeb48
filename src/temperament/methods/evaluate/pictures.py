from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from temperament.bases.worlds import sprites
from temperament.bases.worlds.draw import Draw
from temperament.engine import see
from temperament.engine.measure import Pure, System, content_key
from temperament.engine.pictures import Picture, png, size_of, thumbnail
from temperament.errors import UserError
from temperament.parts import part
from temperament.protocols import Outcome, Pictured

Factor = Literal["shape", "colour", "texture", "place", "background", "caption"]
NONE = "(it names no such classes)"


@dataclass(frozen=True)
class PictureSkill:
    """Pictures, each to be named: 1 where the class it is given is its own. The head that is asked is the one that tells
    exactly these classes apart; a model of pictures and words chooses among captions where it has none."""

    name: str
    pictures: tuple[Picture, ...]
    classes: tuple[str, ...]  # empty: each picture is asked for one of its own captions
    template: str = "{}"
    role: str = "retained"
    metric: str = "accuracy"
    distance: str | None = None
    how = {}

    def key(self) -> str:
        asked = [(p.id, _content(p.image), p.label, p.alternatives) for p in self.pictures]
        return content_key("pictures", self.name, self.classes, self.template, asked)

    def some(self, n: int) -> PictureSkill:
        return replace(self, pictures=self.pictures[:n])

    @torch.no_grad()
    def measure(self, system: System) -> list[Outcome]:
        base, out, size = system.base, [], size_of(system.base)
        changed = system.model is not None or base.originals or base.hung
        device = next(base.model.parameters()).device
        for start in range(0, len(self.pictures), system.batch):
            some = self.pictures[start : start + system.batch]
            pixels = torch.stack([p.pixels(size) for p in some])
            said = self.asked(system.subject, base, pixels.to(device), some)
            was = said
            if system.graded and changed:
                was = self.asked(Pure(base), base, pixels.to(device), some)
            rows = zip(some, pixels, _rows(said, some), _rows(was, some), strict=True)
            out += [self._outcome(*row, system.graded) for row in rows]
        return out

    def asked(self, model: Any, base: Any, pixels: Tensor, some: Sequence[Picture]) -> Tensor | None:
        """(rows, classes) log-probs, nats; None where the model has no way to name these classes."""
        head = see.head_for(model, base, self.classes) if self.classes else None
        if head is not None:
            return see.logits(model, base, pixels, head or None).float().log_softmax(-1)
        if not see.dual(base):
            return None
        named = [self.template.format(c) for c in self.classes]
        return see.fits(model, base, pixels, [p.alternatives or named for p in some]).float().log_softmax(-1)

    def _outcome(self, p: Picture, pixels: Tensor, said: Tensor | None, was: Tensor | None, graded: bool) -> Outcome:
        names = self.classes or p.alternatives
        shown = {"image": png(thumbnail(pixels))} if graded else {}
        told = {"id": p.id, "skill": self.name, "prompt": p.caption, "expected": names[p.label], "extra": shown}
        if said is None or float(said.max() - said.min()) == 0:  # a head at strength 0 says nothing
            return Outcome(**told, output=NONE, score=0.0)
        k = int(said.argmax())
        kl = float((was.exp() * (was - said)).sum().clamp(min=0)) if graded and was is not None else None
        return Outcome(**told, output=names[k], score=float(k == p.label), nll=-float(said[p.label]), kl=kl)


def _rows(said: Tensor | None, some: Sequence[Picture]) -> list[Tensor | None]:
    return [None] * len(some) if said is None else list(said.cpu())


def _content(image: Any) -> str:
    data = Path(image).read_bytes() if isinstance(image, str) else torch.as_tensor(image).contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


@part("evaluate.pictures", modalities=("image",))
@dataclass(frozen=True)
class Pictures:
    """Pictures that no training saw, each to be named: what share is right, item by item with the picture.

    `of` a source: its held-out rows, by the head that tells its classes apart. Else the sprite world: what the base's own
    head tells apart, and for a model of pictures and words every factor among its alternatives, and whole captions of two
    subjects among sixteen. A base that has no head for some classes names none of them right.
    """

    of: Pictured | None = None  # a source of pictures; null: the sprite world
    factors: list[Factor] = field(default_factory=list)  # of the sprite world; empty: what the base is meant to know
    role: Literal["target", "retained", ""] = ""  # what the ledger calls it; default: target for a source, else retained
    name: str = ""  # of the skill of a source; default: what the source calls it
    template: str = "a photo of a {}"  # the caption of a class, for a model of words, where a picture brings none
    items: int | None = None  # pictures a skill; default: evaluation.items
    seed: int = 0  # which scenes of the sprite world; which of a source's pictures, where it has more than `items`

    def __post_init__(self):
        if "{}" not in self.template:
            raise ValueError("template must hold {} where the class stands")
        if self.of is not None and self.factors:
            raise ValueError("factors are of the sprite world: leave them out beside `of`")

    def skills(self, ctx: Any) -> list[PictureSkill]:
        size_of(ctx.base)  # refuses a base that takes no pictures
        if not see.names_pictures(ctx.base):
            raise UserError("evaluate.pictures", ctx.base.id, "it makes pictures and names none; use e.g. lab/vit or lab/clip")
        n = self.items or ctx.items
        if self.of is not None:
            pictures, classes = self._own(self.of.held(ctx.base), n), tuple(self.of.classes(ctx.base))
            if not pictures:
                raise UserError("evaluate.pictures.of", type(self.of).part_name, "it holds no pictures out of training")
            return [PictureSkill(self.name or self.of.called, tuple(pictures), classes, self.template, self.role or "target")]
        return [self._factor(f, n) for f in self.factors or self._known(ctx.base)]

    def _own(self, held: list[Picture], n: int) -> list[Picture]:
        """n of them; of another seed others, while there are enough: what is chosen by some is measured on others."""
        parts = len(held) // n
        k = 1 + (self.seed - 1) % (parts - 1) if self.seed and parts > 1 else 0
        return held[k * n : (k + 1) * n]

    def _known(self, base: Any) -> list[str]:
        if see.dual(base):
            return [*sprites.FACTORS, "caption"]
        known = [f for f, values in sprites.FACTORS.items() if list(values) == see.own_classes(base)]
        if not known:
            mend = "its classes are not of the sprite world; name pictures to ask, e.g. {data.folder_images: {path: ...}}"
            raise UserError("evaluate.pictures.of", None, mend)
        return known

    def _factor(self, factor: str, n: int) -> PictureSkill:
        whole = factor == "caption"
        found = list(dict.fromkeys(sprites.scenes("test", 3 * n + 48, self.seed, subjects=(2,) if whole else (1,))))
        pictures = tuple(self._picture(i, s, factor, found) for i, s in enumerate(found[:n]))
        return PictureSkill(factor, pictures, () if whole else sprites.FACTORS[factor], role=self.role or "retained")

    def _picture(self, i: int, scene: sprites.Scene, factor: str, others: Sequence[sprites.Scene]) -> Picture:
        caption, id = scene.caption(), f"{factor}/{self.seed}/{i}"
        if factor == "caption":
            draw = Draw("evaluate.pictures", self.seed, caption)
            wrong = list(dict.fromkeys(c for s in draw.sample(others, 40) if (c := s.caption()) != caption))[:15]
            k = draw.below(len(wrong) + 1)
            options = [*wrong[:k], caption, *wrong[k:]]
        else:
            options, k = sprites.alternatives(scene, factor)
        return Picture(sprites.render(scene), caption, k, id, alternatives=tuple(options))
