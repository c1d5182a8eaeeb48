from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from temperament.delta import Delta
from temperament.delta.depth import block_of
from temperament.delta.merge_run import Engine, Held, surveyed, tensors_of
from temperament.delta.merging import Blockwise, Site
from temperament.nn import draws
from temperament.parts import part

ATTENTION, MLP = ("attn", "attention"), ("mlp", "ffn", "feed_forward", "block_sparse", "fc", "dense")


@part("merge.half_reset", papers=["012"])
@dataclass(frozen=True)
class HalfReset(Blockwise):
    """Half of a tuned model's matrices, drawn at random, go back to what they were before.

        W = base  for a random `share` of the tensors of each category (attention, MLP, norm), W = tuned  for the rest

    Knowledge returns with the reset half while what was learned mostly stays. Share 0 is the tuned model, 1 the base. What
    lies outside the blocks (embeddings, head) keeps its change; tensors that were not tuned are not counted. Source: Hui et
    al. 2024, Half Fine-Tuning (paper 012), its pilot.
    """

    space = "weights"
    fewest = most = 1

    share: float = 0.5  # share of the tensors that is reset
    by: Literal["category", "layer", "model"] = "category"  # within what the share holds
    seed: int = 0  # of the draw

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"share lies in [0, 1], not {self.share}")

    def survey(self, sites: list[Site]) -> frozenset[str]:
        return self.chosen([site.name for site in sites])

    def plan(self, site: Site):
        return (lambda b: b.base) if site.name in site.state else (lambda b: b.x[0])

    def merge(self, base: Any, deltas: Sequence[Delta]) -> Delta:
        self.check(len(deltas))
        source, delta = tensors_of(base), deltas[0]
        shapes = {n: source.entry(n).shape for n in sorted(delta.changes) if source.entry(n).dtype.is_floating_point}
        sites = surveyed(Engine(self, Held([delta], source, self.space)), shapes, 1, lambda name: 0.0)
        chosen = sites[0].state if sites else ()
        return deltas[0].restrict(lambda name: name not in chosen)

    def chosen(self, names: list[str]) -> frozenset[str]:
        """Names that go back."""
        groups: dict[str, list[list[str]]] = defaultdict(list)
        units: dict[Any, list[str]] = defaultdict(list)
        for name in sorted(names):
            at = block_of(name)
            if at is not None:
                key = at if self.by == "layer" else name
                units[key].append(name)
        for members in units.values():
            category = "layer" if self.by == "layer" else "model" if self.by == "model" else category_of(members[0])
            groups[category].append(members)
        out: set[str] = set()
        for category, members in sorted(groups.items()):
            order = draws.permutation(len(members), self.seed, f"half_reset/{category}").tolist()
            for i in order[: int(self.share * len(members) + 0.5)]:
                out.update(members[i])
        return frozenset(out)


def category_of(name: str) -> str:
    if "norm" in name or ".ln_" in name:
        return "norm"
    return "attention" if any(a in name for a in ATTENTION) else "mlp" if any(m in name for m in MLP) else "other"
