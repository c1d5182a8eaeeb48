"""What suites of generators share: pictures with noise of their own, and how far apart pictures of one caption are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from temperament.engine.measure import System, content_key
from temperament.engine.pictures import png
from temperament.protocols import Outcome


@dataclass(frozen=True)
class VarietySkill:
    """How far apart pictures of one caption are."""

    name: str
    captions: tuple[str, ...]
    role: str = "retained"
    metric: str = "DIV"
    distance: str | None = None
    how = {"unit": "rms"}

    def key(self) -> str:
        return content_key("variety", self.name, self.captions)

    @classmethod
    def of(cls, captions: Sequence[str], n: int) -> VarietySkill:
        """n pictures, of each caption several."""
        few = list(captions)[: max(n // 4, 1)]
        return cls("variety", tuple(few[i % len(few)] for i in range(n)))

    def some(self, n: int) -> VarietySkill:
        return replace(self, captions=self.captions[:n])

    def measure(self, system: System) -> list[Outcome]:
        pixels = painted(self, system)
        seen = [_thumbnail(p) for p in pixels]
        far, pair = _distances(seen, self.captions)
        apart = (far * pair).sum(1) / pair.sum(1).clip(min=1)
        return [
            Outcome(f"{self.name}/{i}", self.name, c, output=f"{s:.3f} from the others", score=float(s),
                    extra={"image": png(p), "seen": seen[i]})
            for i, (c, s, p) in enumerate(zip(self.captions, apart, pixels, strict=True))
        ]  # fmt: skip

    def of_set(self, outcomes: Sequence[Outcome]) -> Callable[[np.ndarray], float]:
        """The mean over pairs of one caption, of any resampled rows; an item beside itself is no pair."""
        far, pair = _distances([o.extra["seen"] for o in outcomes], [o.prompt for o in outcomes])

        def value(rows: np.ndarray) -> float:
            here = pair[np.ix_(rows, rows)]
            return float((far[np.ix_(rows, rows)] * here).sum() / max(here.sum(), 1))

        return value


def painted(skill: Any, system: System) -> Tensor:
    """Noise of its own for each row, other than that of the first rows of every other skill."""
    ids = torch.arange(len(skill.captions)) + int(content_key(skill.name)[:6], 16)
    return system.paint(list(skill.captions), ids)


def _thumbnail(pixels: Tensor, side: int = 8) -> list[float]:
    """(3 * side * side,): what of a picture is kept in the ledger to be compared."""
    small = torch.nn.functional.adaptive_avg_pool2d(pixels, min(side, *pixels.shape[1:]))
    return [round(v, 4) for v in small.flatten().tolist()]


def _distances(seen: Sequence[Sequence[float]], captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(rows, rows): root mean squares, and which two are pictures of one caption."""
    flat = np.array(seen)
    far = np.sqrt(np.square(flat[:, None] - flat[None]).mean(-1))
    same = np.array([[a == b for b in captions] for a in captions])
    return far, same & ~np.eye(len(flat), dtype=bool)
