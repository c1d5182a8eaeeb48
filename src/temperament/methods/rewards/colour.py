from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from temperament.parts import part


@part("rewards.colour", modalities=("image",))
@dataclass(frozen=True)
class Colour:
    """How near a picture's mean colour is to a target: 1 - mean_c |mean_p x_c - target_c|, in 0..1.

    Pixels outside of 0..1 count as the edge they lie beyond."""

    target: tuple[float, float, float] = (0.5, 0.5, 0.5)  # red, green, blue in 0..1

    def __post_init__(self):
        if any(not 0 <= c <= 1 for c in self.target):
            raise ValueError("target must be three numbers in 0..1")

    def value(self, pixels: Tensor, captions: Sequence[str]) -> Tensor:
        mean = pixels.clamp(0, 1).mean((2, 3))
        return 1 - (mean - torch.tensor(self.target).to(pixels)).abs().mean(1)
