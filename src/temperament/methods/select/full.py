from __future__ import annotations

from dataclasses import dataclass

from temperament.parts import part
from temperament.train.trained import Param, Trained


@part("select.full")
@dataclass(frozen=True)
class Full:
    """Full fine-tuning: every parameter is trained; the reference for gain, and usually for loss.

    `only` narrows it to places (name suffixes, roles such as q or mlp, a regular expression); `freeze` leaves places out.
    """

    only: tuple[str, ...] = ()  # train only these places; empty: all
    freeze: tuple[str, ...] = ()  # never train these places

    def build(self, base, ctx) -> Trained:
        wanted = {p.name for p in base.places.match(list(self.only), "select.full.only")} if self.only else None
        frozen = {p.name for p in base.places.match(list(self.freeze), "select.full.freeze")} if self.freeze else set()
        return Trained(
            params=parameters(base, lambda place: (wanted is None or place.name in wanted) and place.name not in frozen)
        )


def parameters(base, keep) -> list[Param]:
    """Records of the base's parameters at the places that `keep`; tied ones once."""
    records = []
    for name, tensor in base.parameters():
        place, _ = base.places.parameters()[name]
        if keep(place):
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
