from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from temperament.engine.contribution import Scaled
from temperament.parts import part


@part("decode.ftc_scaling", papers=["028"], modalities=("text",))
@dataclass(frozen=True)
class FTCScaling:
    """Scale what tuning adds, inside the forward pass: every block adds PTC + alpha FTC to the stream, both at its own input.

        x_{l+1} = x_l + PTC_l + alpha FTC_l        PTC_l: what block l adds in the base;  FTC_l: what it adds beyond that now

    alpha 1 is the tuned model, 0 the base's blocks between the tuned embeddings, norm and head; above 1 it is amplified. Not
    the dial: that scales weights, this scales what they do; where only the last map of each block was tuned they agree. What
    counts as tuning is what the steps before left: a look while an adapter trains sees that adapter whole. Two forwards of
    every block and no cache. Source: paper 028, alpha from 0.75 to 1.25.
    """

    alpha: float = 1.0  # factor of the fine-tuning contribution

    def models(self, base: Any) -> dict[str, Any]:
        nothing = self.alpha == 1 or not (base.originals or base.hung)
        return {} if nothing else {"model": Scaled(base, self.alpha)}

    def hooks(self, base: Any) -> list[Any]:
        return []
