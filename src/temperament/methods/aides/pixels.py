from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from temperament.parts import part


@part("aides.pixels", modalities=("image",))
@dataclass(frozen=True)
class Pixels:
    """Features of a picture without any model: its thumbnail and its colours, each of length 1, side by side.

        f(x) = [ t / |t|, h / |h| ] / sqrt 2      t: (3, side, side) means of cells, less their mean
                                                  h: bins^3 soft counts of colours

    It sees composition and palette, nothing of what is shown: enough to tell one subject's photos from another's in one
    setting, no judge of a likeness. Name an encoder (`aides.encoder`) where there is one."""

    role: ClassVar = "features"
    side: int = 8  # of the thumbnail
    bins: int = 4  # of each colour

    def __post_init__(self):
        if self.side < 2 or self.bins < 2:
            raise ValueError("side and bins must be at least 2")

    def ask(self, requests: Tensor) -> Tensor:
        """(rows, 3, H, W) in 0..1 -> (rows, width), of length 1."""
        pixels = requests.clamp(0, 1)
        thumbnail = F.adaptive_avg_pool2d(pixels, self.side).flatten(1)
        counts = self._counts(pixels).flatten(1)
        unit = lambda v: F.normalize(v, dim=1)
        return torch.cat([unit(thumbnail - thumbnail.mean(1, keepdim=True)), unit(counts)], 1) / 2**0.5

    def _counts(self, pixels: Tensor) -> Tensor:
        """(rows, bins, bins, bins): each pixel shared out to its nearest bins."""
        middle = torch.linspace(0, 1, self.bins).to(pixels)
        r, g, b = (
            (1 - (pixels[:, c].flatten(1)[..., None] - middle).abs() * (self.bins - 1)).clamp(min=0) for c in range(3)
        )  # each (rows, pixels, bins)
        return torch.einsum("npi,npj,npk->nijk", r, g, b)
