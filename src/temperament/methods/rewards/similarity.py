from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from temperament.bases.load import load
from temperament.parts import part


@part("rewards.similarity", modalities=("image",))
@dataclass(frozen=True)
class Similarity:
    """How well a picture fits its caption: the cosine of the two in a frozen image-text encoder, -1..1.

        value = <f(x), g(c)>,   f, g on the unit sphere

    The encoder is another model than the one that is tuned, and a reward that is trained on is no longer a measure: judge
    with a second encoder. Pictures are resized to its own size. Source: Radford et al. 2021 (CLIP); Hessel et al. 2021."""

    encoder: str = "lab/clip"  # an image-text encoder: a lab base, a folder or a Hugging Face id

    def value(self, pixels: Tensor, captions: Sequence[str]) -> Tensor:
        from temperament.engine.see import image_features, text_features

        base = _loaded(self.encoder, str(pixels.device))
        found = image_features(base.model, base, sized(base, pixels))
        return (found * text_features(base.model, base, captions).to(found)).sum(1)


def sized(base: Any, pixels: Tensor) -> Tensor:
    """Pixels of any size as the encoder takes them."""
    from temperament.engine.pictures import size_of

    size = size_of(base)
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return F.interpolate(pixels, size, mode="bilinear", antialias=True)


@lru_cache(maxsize=4)
def _loaded(spec: str, device: str) -> Any:
    base = load(spec, device=device, field="rewards.similarity.encoder")
    for _, p in base.parameters():
        p.requires_grad_(False)
    return base
