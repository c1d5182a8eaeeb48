from __future__ import annotations

from dataclasses import dataclass

from temperament.parts import part
from temperament.train.trained import Trained, records


@part("select.full")
@dataclass(frozen=True)
class Full:
    """Full fine-tuning: every parameter is trained; the reference for gain, and usually for loss.

    `only` narrows it to places (name suffixes, roles such as q or mlp, a regular expression); `freeze` leaves places out. Of
    a pipeline the denoiser is trained, the text encoder if asked for (`only: [denoiser, text_encoder]`), the codec never.
    """

    only: tuple[str, ...] = ()  # train only these places; empty: all
    freeze: tuple[str, ...] = ()  # never train these places

    def build(self, base, ctx) -> Trained:
        chosen = base.places.match(list(self.only), "select.full.only") if self.only else base.places.usual
        frozen = {p.name for p in base.places.match(list(self.freeze), "select.full.freeze")} if self.freeze else set()
        wanted = {p.name for p in chosen} - frozen
        return Trained(params=records(base, lambda place: place.name in wanted))
