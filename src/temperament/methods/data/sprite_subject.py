from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from temperament.bases.worlds import sprites
from temperament.engine.pictures import Picture
from temperament.nn import draws
from temperament.parts import part


@part("data.sprite_subject", modalities=("image",))
@dataclass(frozen=True)
class SpriteSubject:
    """A few pictures of one sprite that no base has seen: a subject to be taught, told from its class by a name.

    Captions say "a {identifier} {noun} at the top left on navy"; the two words are filled in by the source around it
    (`data.prior_preservation`). The sprite's colours stay, its place and the background change."""

    sprite: int = 0  # which of the sprites held out of every training
    pictures_of_it: int = 4  # how many pictures
    seed: int = 0  # its colour, and where it is shown

    def __post_init__(self):
        if self.pictures_of_it < 1 or self.sprite < 0:
            raise ValueError("pictures_of_it is at least 1, sprite not negative")

    @property
    def name(self) -> str:
        return sprites.sprites("test", self.sprite + 1)[-1]

    def scenes(self) -> list[sprites.Scene]:
        """All places and backgrounds, in an order of the seed's: the first ones are taught."""
        colours = list(sprites.COLOURS)
        colour = colours[int(draws.permutation(len(colours), self.seed, "sprite subject/colour", self.sprite)[0])]
        every = [(place, ground) for place in sprites.PLACES for ground in sprites.BACKGROUNDS]
        order = draws.permutation(len(every), self.seed, "sprite subject/scenes", self.sprite).tolist()
        shift = lambda k: (k % 2, k // 2 % 2)
        return [
            sprites.Scene((sprites.Subject(self.name, colour, "plain", every[i][0], shift(k)),), every[i][1])
            for k, i in enumerate(order)
        ]

    def pictures(self, ctx: Any) -> list[Picture]:
        words = {self.name: "{identifier} {noun}"}
        shown = self.scenes()[: self.pictures_of_it]
        return [Picture(sprites.render(s), s.caption(words), id=f"{self.name}/{i}") for i, s in enumerate(shown)]
