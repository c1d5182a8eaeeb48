from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from temperament.bases.worlds import sprites as world
from temperament.bases.worlds.draw import Draw, split_of
from temperament.engine import see
from temperament.engine.pictures import Picture, Stream
from temperament.parts import part, plain

Domain = Literal["plain", "shifted", "noise", "blur", "contrast", "pixelate", "fog"]


@part("data.sprites", modalities=("image",))
@dataclass(frozen=True)
class Sprites:
    """Pictures of the sprite world with their captions, each labelled by one of its factors, or by who is seen on it.

    With `figures` the classes are sprites by number, of which no base has seen any; else the values of a factor of the
    first subject or the background. Combinations of factors that are held out for ever are what it is measured on. A domain is
    the same scenes in other colours or corrupted.
    """

    label: Literal["shape", "colour", "texture", "place", "background"] = "shape"  # the factor that is the class
    figures: int = 0  # so many unseen figures as classes instead; each is called "sprite N"
    rows: int = 1000  # pictures to train on
    subjects: list[int] = field(default_factory=lambda: [1])  # how many a scene may hold: 1, 2
    domain: Domain = "plain"  # shifted: other colours; the others are corruptions
    severity: int = 3  # of a corruption, 1 to 5
    cue: float = 0.0  # share of training pictures whose background tells the class, as none that is held out does
    seed: int = 0  # which scenes

    yields: ClassVar = ("Images",)

    def __post_init__(self):
        if self.rows < 1 or self.figures < 0 or not 1 <= self.severity <= 5:
            raise ValueError("rows is at least 1, figures not negative, severity 1 to 5")
        if not 0 <= self.cue <= 1 or (self.cue and self.label == "background" and not self.figures):
            raise ValueError("cue must lie in 0..1, and the label be another factor than the background")
        if not self.subjects or not set(self.subjects) <= {1, 2}:
            raise ValueError(f"subjects must name 1, 2 or both, not {self.subjects}")
        if self.figures and self.subjects != [1]:
            raise ValueError("figures stand alone: leave subjects at [1]")

    @property
    def called(self) -> str:
        what = f"{self.figures} figures" if self.figures else self.label
        where = "" if self.domain == "plain" else f", {self.domain}{'' if self.domain == 'shifted' else f' {self.severity}'}"
        return what + where

    def classes(self, base: Any = None) -> list[str]:
        return world.sprites("test", self.figures) if self.figures else list(world.FACTORS[self.label])

    def held(self, base: Any = None) -> list[Picture]:
        return self._pictures("test", 500)

    def open(self, ctx: Any) -> Stream:
        see.must_know(ctx, self.classes(), "data.sprites")
        return Stream(self._pictures("train", self.rows), ctx, "sprites")

    def suites(self) -> list[dict]:
        return [{"evaluate.pictures": {"of": plain(self)}}]

    def _pictures(self, split: str, n: int) -> list[Picture]:
        scenes = [self._cued(s, i) if split == "train" else s for i, s in enumerate(self._scenes(split, n))]
        return [self._picture(s, f"{split}/{self.seed}/{i}") for i, s in enumerate(scenes)]

    def _cued(self, scene: world.Scene, i: int) -> world.Scene:
        """The scene on the background of its class, where a training picture may have that."""
        if not self.cue or not Draw("cue", self.seed, i).chance(self.cue):
            return scene
        who = scene.subjects[0].shape if self.figures else world.value(scene, self.label)
        told = tuple(world.BACKGROUNDS)[self.classes().index(who) % len(world.BACKGROUNDS)]
        other = replace(scene, background=told)
        split = self._split(other) if self.figures else other.split
        return other if split == "train" else scene

    def _scenes(self, split: str, n: int) -> list[world.Scene]:
        if not self.figures:
            return world.scenes(split, n, self.seed, self.subjects)
        # Figures of the test split are in no training picture of any base; of them, one combination in ten is held out here.
        found, more = [], n
        while len(found) < n:
            more *= 2 if split == "train" else 12
            drawn = world.scenes("test", more, self.seed, shapes=self.classes())
            found = [s for s in drawn if self._split(s) == split][:n]
        return found

    def _split(self, scene: world.Scene) -> str:
        who = scene.subjects[0]
        return split_of("figures", who.shape, who.colour, who.place, scene.background)

    def _picture(self, scene: world.Scene, id: str) -> Picture:
        if self.figures:
            first, names = scene.subjects[0], self.classes()
            options = tuple(f"a {name} at the {first.place} on {scene.background}" for name in names)
            return Picture(self._seen(scene, id), options[k := names.index(first.shape)], k, id, alternatives=options)
        said, k = world.alternatives(scene, self.label)
        return Picture(self._seen(scene, id), scene.caption(), k, id, alternatives=tuple(said))

    def _seen(self, scene: world.Scene, id: str) -> np.ndarray:
        image = world.render(scene)
        if self.domain == "plain":
            return image
        if self.domain == "shifted":
            return world.shift_colours(image)
        return world.corrupt(image, self.domain, self.severity, Draw("domain", self.domain, self.severity, id))
