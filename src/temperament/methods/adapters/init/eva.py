from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from temperament.errors import UserError
from temperament.nn import forward
from temperament.nn.batch import Batch, Tokens
from temperament.nn.linalg import IncrementalPCA
from temperament.nn.taps import patch
from temperament.parts import part


@part("adapters.init.eva", papers=["087"])
@dataclass(frozen=True)
class EVA:
    """Explained-variance adaptation: LoRA begins at the directions its inputs vary in; ranks go where they vary most.

        A_l = the first r_l principal directions of the inputs of place l (rows, orthonormal), B_l = 0
        r_l: all components of all places, sorted by the share of variance they explain; the first (rank * places) are given out

    A pass over the data before training collects inputs by incremental PCA until the needed components have settled (|cos|
    of successive ones at least `tau`). A place may get up to rho * rank directions, or none: then it has no adapter. alpha /
    rank stays what it was. With rho = 1 nothing is redistributed. Places that read one tensor (q, k, v; gate, up) share a PCA.
    Source: Paischer et al. 2024, One Initialization to Rule them All (paper 087).
    """

    rho: float = 2.0  # most directions a place may get, over the rank
    tau: float = 0.99  # cosine from which a component counts as settled
    rows: int = 8  # rows of one update
    updates: int = 200  # updates at most
    on: Literal["all", "trained"] = "all"  # tokens that are looked at: all, or those that carry loss
    whiten: bool = False  # divide each direction by the root of its singular value

    def __post_init__(self):
        if self.rho < 1 or not 0 < self.tau <= 1 or min(self.rows, self.updates) < 1:
            raise ValueError("rho is at least 1, tau in (0, 1], rows and updates at least 1")

    # -- the pass over data -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, base: Any, ctx: Any, batches: Iterable[Batch], places: list[Any], rank: int) -> dict[str, Tensor]:
        """A (r_l, in) for every place that gets ranks."""
        odd = next((p for p in places if p.kind not in ("linear", "conv1d")), None)
        if odd is not None:
            raise UserError("adapters.lora.targets", odd.name, f"its input is no vector ({odd.kind}); EVA takes linear maps")
        look = _Look(places, round(rank * self.rho))
        settled: dict[str, Tensor] = {}
        for k, tokens in enumerate(self._micro(batches)):
            look.at(base, tokens.to(forward.device_of(base.model)), tokens.mask if self.on == "all" else tokens.weights > 0)
            ranks = self.ranks(look, places, rank)
            ctx.tell("prepare", done=k + 1, total=self.updates)
            if k + 1 >= self.updates or (k and self._settled(settled, look, ranks)):
                break
            settled = {name: pca.components for name, pca in look.pca.items()}
        if not look.pca:
            raise UserError("adapters.init.eva", "the source", "it gave no text to look at; EVA needs batches of tokens")
        return {p.name: self._directions(look.of(p), ranks[p.name]) for p in places if ranks[p.name]}

    def _micro(self, batches: Iterable[Batch]) -> Iterable[Tokens]:
        for batch in batches:
            for tokens in [batch] if isinstance(batch, Tokens) else [v for v in vars(batch).values() if isinstance(v, Tokens)]:
                yield from (micro.trim() for micro in tokens.split(self.rows))

    def _settled(self, before: dict[str, Tensor], look: _Look, ranks: dict[str, int]) -> bool:
        for name, pca in look.pca.items():
            needed = max(ranks[n] for n, leader in look.leader.items() if leader == name)
            old, new = before[name], pca.components
            if needed > len(old) or ((old[:needed] * new[:needed]).sum(1).abs() < self.tau).any():
                return False
        return True

    def ranks(self, look: _Look, places: list[Any], rank: int) -> dict[str, int]:
        """How many directions each place gets of rank * places, the most explaining first; of equals the earlier place."""
        shares = []
        for i, p in enumerate(places):
            pca = look.of(p)
            most = min(look.keep, *p.shape[:2])
            real = pca.values[:most] > 1e-5 * pca.values[0].clamp(min=1e-30)
            shares += [(-s, i) for s, there in zip(pca.explained[:most].tolist(), real.tolist(), strict=True) if there]
        given = dict.fromkeys((p.name for p in places), 0)
        for _, i in sorted(shares)[: rank * len(places)]:
            given[places[i].name] += 1
        return given

    def _directions(self, pca: IncrementalPCA, rank: int) -> Tensor:
        A = pca.components[:rank]
        return (A / pca.values[:rank, None].sqrt() if self.whiten else A).float().contiguous()

    # -- the adapter's start ------------------------------------------------------------------------------------------------

    def factors(self, place: Any, rank: int, prepared: dict[str, Tensor], seed: int) -> tuple[Tensor, Tensor] | None:
        """(A, B) of a place, or None where it gets no rank."""
        A = prepared.get(place.name)
        if A is None:
            return None
        return A.to(place.weight), place.weight.new_zeros(place.shape[0], len(A))


class _Look:
    """The inputs of places, batch by batch, in one PCA for all places that read one tensor."""

    def __init__(self, places: list[Any], keep: int):
        self.places, self.keep = places, keep
        self.pca: dict[str, IncrementalPCA] = {}
        self.leader: dict[str, str] = {}

    def of(self, place: Any) -> IncrementalPCA:
        return self.pca[self.leader[place.name]]

    def at(self, base: Any, tokens: Tokens, mask: Tensor) -> None:
        last: list[Any] = [None, ""]

        def see(h: Tensor, where: Any) -> Tensor:
            first = where.name not in self.leader
            if first:
                self.leader[where.name] = last[1] if h is last[0] else where.name
            leader = self.leader[where.name]
            if leader == where.name:
                rows = h.reshape(-1, h.shape[-1])[mask.reshape(-1).to(h.device)]
                self.pca.setdefault(leader, IncrementalPCA(self.keep)).update(rows)
            last[0], last[1] = h, leader
            return h

        with patch(base.components, self.places, see, at="input"):
            base.model(**forward.inputs(base.model, tokens))
