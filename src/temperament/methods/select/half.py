from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

from temperament.errors import UserError
from temperament.nn import draws
from temperament.parts import part
from temperament.train.trained import Trained, records

CATEGORIES = {"q": "attention", "k": "attention", "v": "attention", "o": "attention", "qkv": "attention", "kv": "attention",
              "gate": "mlp", "up": "mlp", "down": "mlp", "gate_up": "mlp"}  # fmt: skip


@part("select.half", papers=["012"])
@dataclass(frozen=True)
class Half:
    """Half fine-tuning: every block trains half of its weight matrices and keeps the rest.

        by category, in each block: 2 of {q, k, v, o}; of {gate, up, down} 2 in half of the blocks and 1 in the others; half of
        the norms. Odd categories alternate over blocks in a random order, so the share holds over the model.
        by layer: all of half the blocks; by model: half of all block tensors.

    Frozen tensors keep what they knew, bit for bit. The choice is redrawn for each step of a recipe and each round, so over
    many stages the changes average out. Embeddings, head and final norm are trained, outside the count (`outside: false`
    freezes them). The masked update is full fine-tuning's times the mask. Source: Hui et al. 2024, Half Fine-Tuning (paper
    012).
    """

    share: float = 0.5  # share of the tensors of each category that is trained
    by: Literal["category", "layer", "model"] = "category"  # within what the share holds
    outside: bool = True  # train embeddings, head and what else lies outside the blocks
    draw: int = 0  # another number draws another half

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"share lies in (0, 1], not {self.share}")

    def build(self, base: Any, ctx: Any) -> Trained:
        chosen = self.choose(base.places.usual, ctx.seed, ctx.round)
        return Trained(params=records(base, lambda place: place.name in chosen))

    def choose(self, places: Any, seed: int, round: int = 0) -> set[str]:
        """Names of the places that are trained this time."""
        blocks = places.blocks()
        if not blocks:
            raise UserError("select.half", "the base", "it has no blocks that can be halved; use select.full")
        groups: dict[Any, list[list[str]]] = defaultdict(list)  # what is halved together -> for each block the places
        inside: set[str] = set()
        for block in blocks:
            found: dict[Any, list[str]] = defaultdict(list)
            for place in block.places:
                inside.add(place.name)
                category = CATEGORIES.get(place.role, "norm" if place.category == "norm" else place.category)
                found[{"category": (block.stack, category), "layer": "layer", "model": "model"}[self.by]].append(place.name)
            for key, members in found.items():
                groups[key].append(members)
        chosen = {p.name for p in places if p.name not in inside} if self.outside else set()
        for key, members in sorted(groups.items(), key=lambda kv: str(kv[0])):
            address = f"half/{key}/{self.draw}/{round}"
            if self.by == "layer":
                order = draws.permutation(len(members), seed, address).tolist()
                for i in order[: round_half(self.share * len(members))]:
                    chosen.update(members[i])
            elif self.by == "model":
                everything = [m for block in members for m in block]
                order = draws.permutation(len(everything), seed, address).tolist()
                chosen.update(everything[i] for i in order[: round_half(self.share * len(everything))])
            else:
                chosen.update(self._of_each_block(members, seed, address))
        return chosen

    def _of_each_block(self, blocks: list[list[str]], seed: int, address: str) -> list[str]:
        """floor(share * n) of the n places of every block, one more in as many blocks (drawn) as the share asks for over
        all."""
        low = [int(self.share * len(b)) for b in blocks]
        missing = round_half(sum(self.share * len(b) for b in blocks)) - sum(low)
        able = [i for i in draws.permutation(len(blocks), seed, address + "/blocks").tolist() if low[i] < len(blocks[i])]
        more = set(able[:missing])
        out: list[str] = []
        for i, members in enumerate(blocks):
            order = draws.permutation(len(members), seed, address, i).tolist()
            out += [members[k] for k in order[: low[i] + (i in more)]]
        return out


def round_half(x: float) -> int:
    return int(x + 0.5)
