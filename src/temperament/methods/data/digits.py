from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from temperament.bases.worlds.draw import split_of
from temperament.engine import see
from temperament.engine.pictures import Picture, Stream
from temperament.errors import UserError
from temperament.parts import part, plain


@part("data.digits", modalities=("image",))
@dataclass(frozen=True)
class Digits:
    """Handwritten digits: the 1,797 grey pictures of 8x8 that scikit-learn carries, enlarged to the size of the base.

    Real pictures that need no download. One in five is held out for ever, and is what it is measured on.
    """

    rows: int = 1400  # pictures to train on, at most; the first so many

    yields: ClassVar = ("Images",)
    called: ClassVar = "digits"

    def __post_init__(self):
        if self.rows < 1:
            raise ValueError("rows must be at least 1")

    def classes(self, base: Any = None) -> list[str]:
        return [str(i) for i in range(10)]

    def held(self, base: Any = None) -> list[Picture]:
        return self._pictures("test")

    def open(self, ctx: Any) -> Stream:
        see.must_know(ctx, self.classes(), "data.digits")
        return Stream(self._pictures("train")[: self.rows], ctx, "digits")

    def suites(self) -> list[dict]:
        return [{"evaluate.pictures": {"of": plain(self)}}]

    def _pictures(self, split: str) -> list[Picture]:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError("data.digits", "digits", "it needs scikit-learn; pip install scikit-learn") from None
        found = load_digits()
        images = np.repeat((found.images / 16).astype(np.float32)[:, None], 3, axis=1)
        rows = zip(images, found.target.tolist(), strict=True)
        # One in ten by each of two keys: about one in five.
        held = lambda i: "test" in (split_of("digits", i), split_of("more digits", i))
        return [
            Picture(image, f"a handwritten {k}", k, f"digits/{i}")
            for i, (image, k) in enumerate(rows)
            if held(i) == (split == "test")
        ]
