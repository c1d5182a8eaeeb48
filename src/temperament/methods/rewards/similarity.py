from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from temperament.bases.frozen import frozen
from temperament.engine.pictures import resized, size_of
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

        base = frozen(self.encoder, str(pixels.device), "rewards.similarity.encoder")
        found = image_features(base.model, base, resized(pixels, size_of(base)))
        return (found * text_features(base.model, base, captions).to(found)).sum(1)
