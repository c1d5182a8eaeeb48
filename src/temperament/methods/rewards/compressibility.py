from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from temperament.parts import number, part


@part("rewards.compressibility", papers=["064"], modalities=("image",))
@dataclass(frozen=True)
class Compressibility:
    """How few bits a picture would take, as JPEG counts them before it rounds: coefficients of 8 x 8 blocks.

        value = - mean over coefficients of  log2(1 + |C (x - 1/2) C^T| / step),   C the orthonormal 8 x 8 DCT

    In bits a coefficient, 0 for an even grey; the true size is no smooth function of the pixels, this is. A negative weight
    asks for pictures rich in detail. Pictures are padded to whole blocks with their edge. Source: paper 064 (as in DDPO's
    JPEG reward), with the size made differentiable."""

    step: float = 0.05  # of the quantiser, in pixels of 0..1: what is smaller costs little

    def __post_init__(self):
        if number(self.step, 1.0) <= 0:
            raise ValueError("step must be above 0")

    def value(self, pixels: Tensor, captions: Sequence[str]) -> Tensor:
        height, width = pixels.shape[-2:]
        x = F.pad(pixels, (0, -width % 8, 0, -height % 8), mode="replicate") - 0.5
        blocks = x.unfold(2, 8, 8).unfold(3, 8, 8)  # (rows, 3, H/8, W/8, 8, 8)
        C = _cosines().to(x)
        return -torch.log2(1 + (C @ blocks @ C.T).abs() / self.step).flatten(1).mean(1)


@lru_cache(maxsize=1)
def _cosines() -> Tensor:
    """(8, 8): rows are the basis, C C^T = 1."""
    k, n = torch.arange(8.0)[:, None], torch.arange(8.0)[None]
    C = torch.cos(math.pi / 8 * (n + 0.5) * k) / 2
    C[0] /= math.sqrt(2)
    return C
