from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from temperament.parts import number, part

LUMA = (0.299, 0.587, 0.114)


@part("rewards.brightness", modalities=("image",))
@dataclass(frozen=True)
class Brightness:
    """How near a picture's mean luminance is to a target: 1 - |mean_p (0.299 r + 0.587 g + 0.114 b) - target|, in 0..1.

    Pixels outside of 0..1 count as the edge they lie beyond, so there is nothing to win there. Source: the luma of BT.601."""

    target: float = 1.0  # 1 as bright as can be, 0 black

    def __post_init__(self):
        if not 0 <= number(self.target, 1.0) <= 1:
            raise ValueError("target lies in 0..1")

    def value(self, pixels: Tensor, captions: Sequence[str]) -> Tensor:
        luma = (pixels.clamp(0, 1) * torch.tensor(LUMA).to(pixels).view(3, 1, 1)).sum(1)
        return 1 - (luma.mean((1, 2)) - self.target).abs()
