from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from temperament.nn import draws
from temperament.parts import part


@part("aides.random_features", papers=["054"], modalities=("image",))
@dataclass(frozen=True)
class RandomFeatures:
    """Features of a picture by convolutions that were never trained: edges, colours and where they are, roughly.

        h = relu(W_3 * relu(W_2 * relu(W_1 * (2 x - 1))))      3 x 3 each, the last two in strides of 2
        f(x) = mean of h over a grid of `cells` x `cells`       (rows, width * cells^2)

    W drawn by (seed, layer), of variance 2 / fan-in, so that a feature is of the size of a pixel. They keep a gradient. Two
    seeds are two judges. An encoder that was trained sees more (`aides.encoder`)."""

    role: ClassVar = "features"
    width: int = 64  # channels
    cells: int = 2  # of the grid, in each direction: where things are
    seed: int = 0  # which convolutions

    def __post_init__(self):
        if min(self.width, self.cells) < 1:
            raise ValueError("width and cells are at least 1")

    def ask(self, requests: Tensor) -> Tensor:
        """(rows, 3, H, W) in 0..1 -> (rows, width * cells^2)."""
        h = 2 * requests - 1
        for k, weight in enumerate(_weights(self.width, self.seed)):
            h = F.relu(F.conv2d(h, weight.to(h), stride=1 if k == 0 else 2, padding=1))
        return F.adaptive_avg_pool2d(h, self.cells).flatten(1)


@lru_cache(maxsize=8)
def _weights(width: int, seed: int) -> tuple[Tensor, ...]:
    sizes = (3, max(width // 2, 1), width, width)
    made = []
    for k, (given, out) in enumerate(pairwise(sizes)):
        generator = draws.generator(seed, f"random_features/{k}")
        made.append(torch.randn(out, given, 3, 3, generator=generator) * (2 / (9 * given)) ** 0.5)
    return tuple(made)
