from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from temperament.engine.denoise import denoise
from temperament.engine.pictures import Picture, Stream, images
from temperament.engine.rare import rare_words
from temperament.errors import UserError
from temperament.nn import draws
from temperament.nn.batch import Captions, Images
from temperament.parts import part
from temperament.protocols import Decode, Gallery


@part("data.prior_preservation", papers=["274"], modalities=("image",))
@dataclass(frozen=True)
class PriorPreservation:
    """A few pictures of one subject, beside pictures of its class that the base makes itself (DreamBooth).

        each batch:   (1 - share) rows   "a {identifier} {noun}", the subject
                      share rows         "a {noun}", made by the base before the first step: `prior` rows

    The second kind anchors the class to what the model itself believes, against the drift of the word and the loss of
    variety; `objectives.diffusion.denoise` gives each kind a term and a count of its own, the prior's weighted. Pictures the
    base makes are kept with the step, in eight bits as in files, so a resumed run does not make them again. count 0: the
    subject alone. Captions of the subject are its pictures' own, {identifier} and {noun} in them filled in.
    Source: Ruiz et al. 2023, DreamBooth (paper 274)."""

    of: Gallery  # the subject's pictures, e.g. {data.folder_images: {path: photos, caption: "a {identifier} {noun}"}}
    noun: str  # what kind of thing it is, in a word the base knows: dog, vase, house
    identifier: str = "auto"  # the word that will mean this one; auto: a rare word of the base's tokenizer
    prior: list[str] = field(default_factory=lambda: ["a {noun}"])  # captions of the class, in turn
    count: int = 200  # pictures the base makes
    share: float = 0.5  # of the rows of a batch that are the base's own
    sampler: Decode | None = None  # how it makes them, e.g. {sample.sampler: {eta: 1.0}}; none: as usual for it
    version: Literal["start", "base"] = "start"  # who makes them: the model as this step finds it, or the pure base
    seed: int = 0  # of the rare word

    yields: ClassVar = ("Images",)

    def __post_init__(self):
        if self.count < 0 or not 0 < self.share < 1 or (self.count and not self.prior):
            raise ValueError("count is not negative, share lies between 0 and 1, and prior must name a caption")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.version,) if self.count else ()

    def word(self, base: Any) -> str:
        """The subject's name in captions."""
        if self.identifier != "auto":
            return self.identifier
        if base.tokenizer is None:
            raise UserError("data.prior_preservation.identifier", "auto", "this base reads no captions; give any word")
        return rare_words(base.tokenizer, 1, self.seed, "data.prior_preservation.identifier")[0]

    def filled(self, caption: str, base: Any) -> str:
        return caption.replace("{identifier}", self.word(base)).replace("{noun}", self.noun)

    def pictures(self, ctx: Any) -> list[Picture]:
        """The subject's, as they are taught."""
        found = self.of.pictures(ctx)
        if self.identifier == "auto" and not any("{identifier}" in p.caption for p in found):
            mend = 'say {identifier} in them, e.g. data.folder_images: {caption: "a {identifier} {noun}"}'
            raise UserError("data.prior_preservation.of", found[0].caption, f"its captions never name the subject; {mend}")
        return [replace(p, caption=self.filled(p.caption, ctx.base)) for p in found]

    def class_captions(self) -> list[str]:
        return [c.replace("{noun}", self.noun) for c in self.prior]

    def suites(self) -> list[Any]:
        """What shows whether it was learnt, and what the class lost by it."""
        return [{"evaluate.subject": {"of": self, "prior": self.class_captions()}}]

    def open(self, ctx: Any) -> Stream | _Both:
        subject = self.pictures(ctx)
        if not self.count:
            return Stream(subject, ctx, "subject")
        own = round(ctx.batch * self.share)
        if not 0 < own < ctx.batch:
            mend = f"a share of {self.share:g} of it must leave rows of both kinds; give 2 or more"
            raise UserError("train.batch", ctx.batch, mend)
        return _Both(self, subject, own, ctx)


class _Both:
    """Rows of the subject, then rows of the class; every kind in epochs of its own."""

    def __init__(self, spec: PriorPreservation, subject: list[Picture], own: int, ctx: Any):
        self.spec, self.ctx, self.own = spec, ctx, own
        self.subject = Stream(subject, replace(ctx, batch=ctx.batch - own), "subject")
        self.steps_per_epoch = self.subject.steps_per_epoch
        self._prior: Stream | None = None

    def batch(self, step: int, progress: Any = None) -> Images:
        if self._prior is None:
            self._prior = Stream(self._pictures(), replace(self.ctx, batch=self.own), "prior")
        return _joined(self.subject.batch(step), self._prior.batch(step))

    def largest(self) -> Images:
        rows = self.subject.pictures
        blank = [(i, replace(rows[i % len(rows)], prior=i >= self.ctx.batch - self.own)) for i in range(self.ctx.batch)]
        return images(blank, self.subject.size)

    def _pictures(self) -> list[Picture]:
        """The class as the base paints it. Where no step is being done (a plan, a check: the context has no key) the
        subject's pictures stand in, as their values are of no meaning there."""
        captions = self.spec.class_captions()
        said = [captions[i % len(captions)] for i in range(self.spec.count)]
        if not self.ctx.key:
            shown = self.subject.pictures
            return [replace(shown[i % len(shown)], caption=c, prior=True) for i, c in enumerate(said)]
        made, world = self._kept(), self.ctx.world
        if world.total({"kept": float(made is not None)})["kept"] < world.size:  # painting takes all processes
            made = self._paint(said)
            self._keep(made)
        return [Picture(made[i], c, id=f"prior/{i}", prior=True) for i, c in enumerate(said)]

    def _paint(self, said: list[str]) -> Tensor:
        """(count, 3, H, W) uint8, shared out over the processes."""
        ctx, spec = self.ctx, self.spec
        ctx.tell("phase", name="prior", text=f"the base makes {len(said)} pictures of its own")
        sampler = getattr(spec.sampler, "sampler", None)
        hooks = spec.sampler.hooks(ctx.base) if spec.sampler is not None else ()
        seed = draws.key(ctx.seed, "prior preservation", ctx.round) & 0x7FFFFFFF
        how = {"seed": seed, "hooks": hooks}
        paint = lambda _, rows: denoise(ctx.base, rows.captions, sampler, ids=rows.examples.cpu(), **how).pixels
        whole = Captions(torch.arange(len(said)), said)
        return (ctx.views.precompute(spec.version, whole, paint) * 255).round().to(torch.uint8)

    @property
    def _file(self) -> Path | None:
        return self.ctx.folder / "prior.safetensors" if self.ctx.folder is not None else None

    def _kept(self) -> Tensor | None:
        if self._file is None or not self._file.exists():
            return None
        with safe_open(self._file, "pt") as f:
            return f.get_tensor("pixels") if f.metadata().get("key") == self.ctx.key else None

    def _keep(self, made: Tensor) -> None:
        if self._file is not None and self.ctx.world.main:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"pixels": made.contiguous()}, new := self._file.with_suffix(".part"), {"key": self.ctx.key})
            os.replace(new, self._file)


def _joined(subject: Images, prior: Images) -> Images:
    """One batch; ids stay apart: even ones are the subject's."""
    return Images(
        torch.cat([subject.pixels, prior.pixels]),
        torch.cat([2 * subject.examples, 2 * prior.examples + 1]),
        torch.cat([subject.labels, prior.labels]),
        [*subject.captions, *prior.captions],
        torch.cat([subject.prior, prior.prior]),
    )
