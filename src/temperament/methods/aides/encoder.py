from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from temperament.bases.frozen import frozen
from temperament.engine.pictures import resized, size_of
from temperament.parts import part


@part("aides.encoder", modalities=("image",))
@dataclass(frozen=True)
class Encoder:
    """Features of a picture by a frozen image encoder, of length 1: their cosine is how alike two pictures are to it.

        f(x) = e(x) / |e(x)|      CLIP-I with an image-text encoder, DINO with a self-supervised one

    A judge should be another model than one that helped to train. Pictures are resized to its size. Its weights have no
    gradient, the pictures keep theirs."""

    role: ClassVar = "features"
    model: str = "lab/clip-b"  # an image encoder: a lab base, a folder or a Hugging Face id
    batch: int = 64  # pictures it looks at together

    def ask(self, requests: Tensor) -> Tensor:
        """(rows, 3, H, W) in 0..1 -> (rows, width), of length 1."""
        from temperament.engine.see import features

        base = frozen(self.model, str(requests.device), "aides.encoder.model")
        requests = resized(requests, size_of(base))
        return F.normalize(torch.cat([features(base.model, base, some) for some in requests.split(self.batch)]), dim=1)
