from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from temperament.delta.use import new_value
from temperament.errors import UserError
from temperament.nn import draws, linalg
from temperament.parts import part
from temperament.train.packed import values_at
from temperament.train.trained import Trained, record


@part("select.lottery_ticket", papers=["011"])
@dataclass(frozen=True)
class LotteryTicket:
    """Train only the entries that an earlier step moved furthest, from where that step began (a lottery ticket, rewound).

        mask = the K largest of |theta_1 - theta_0|, over all tensors the step `of` trained together
        theta_1: where that step ended; theta_0: where this step starts - give both steps the same `start`

    What is left is a sparse change of K entries. Sparse changes of two trainings hardly meet, so they compose by adding:
    language + task, in `merge.linear` with `normalise: false`. The recipe: a `train` step that finds the ticket, this step with
    `start: base` (and the same data), then the merge; both trainings take `regularizers.l1`. `by: random` is the control of the
    same size.
    Source: Ansell et al. 2022, Composable Sparse Fine-Tuning for Cross-Lingual Transfer (paper 011).
    """

    of: str  # name of the step that found the ticket
    share: float = 0.05  # share of the entries that step trained
    entries: int | None = None  # or so many entries
    by: Literal["largest", "random"] = "largest"  # largest change, or a random choice of the same size

    def __post_init__(self):
        if not 0 < self.share <= 1 or (self.entries is not None and self.entries < 1):
            raise ValueError("share lies in (0, 1], entries is at least 1")

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.of,)

    def build(self, base: Any, ctx: Any) -> Trained:
        delta = ctx.delta(self.of, "select.lottery_ticket.of")
        if not delta.changes:
            raise UserError("select.lottery_ticket.of", self.of, "it changed no weights; name a step that trained a selection")
        here = dict(base.parameters())
        moved = {n: _moved(delta, n, here[n], base.originals.get(n)) for n in sorted(delta.changes)}
        places, params = base.places.parameters(), []
        for name, entries in self.choose(moved, ctx.seed).items():
            place, weight = places[name][0], here[name]
            values = values_at(weight, entries)
            params.append(record(base.places, name, place, values, base=weight, dense=weight, entries=entries))
        return Trained(params=params)

    @torch.no_grad()
    def choose(self, moved: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """moved: |change| of every tensor -> flat positions of those that are trained, in the tensors that hold any."""
        names, sizes = sorted(moved), [moved[n].numel() for n in sorted(moved)]
        total = sum(sizes)
        k = min(self.entries if self.entries is not None else max(int(self.share * total + 0.5), 1), total)
        if self.by == "random":
            chosen = draws.permutation(total, seed, "lottery_ticket")[:k].sort().values
        else:
            chosen = linalg.largest(torch.cat([moved[n].reshape(-1).float() for n in names]), k)
        found, first = {}, 0
        for name, size in zip(names, sizes, strict=True):
            mine = chosen[(chosen >= first) & (chosen < first + size)] - first
            if len(mine):
                found[name] = mine
            first += size
        return found


@torch.no_grad()
def _moved(delta: Any, name: str, start: Tensor, pure: Tensor | None) -> Tensor:
    """|theta_1 - theta_0| of one tensor: the step's end, made from the pure base, against this step's start."""
    return (new_value(delta, name, start.detach() if pure is None else pure) - start.detach()).abs()
