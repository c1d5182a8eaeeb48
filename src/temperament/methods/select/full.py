from __future__ import annotations

from dataclasses import dataclass

from temperament.parts import part
from temperament.train.trained import Param, Trained


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
        wanted = {p.name for p in chosen}
        frozen = {p.name for p in base.places.match(list(self.freeze), "select.full.freeze")} if self.freeze else set()
        return Trained(
            params=parameters(base, lambda place: place.name in wanted and place.name not in frozen)
        )


def parameters(base, keep) -> list[Param]:
    """Records of the base's parameters at the places that `keep`; tied ones once."""
    records, places = [], base.places.parameters()
    for name, tensor in base.parameters():
        place, _ = places.get(name, (None, ""))
        if place is not None and keep(place):
            role = "bias" if name.endswith("bias") else "weight"
            records.append(
                Param(
                    name,
                    tensor,
                    role,
                    base.places.depth_of(name),
                    base=tensor,
                    decay=role == "weight" and place.category != "norm",
                )
            )
    return records
