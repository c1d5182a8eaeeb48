from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from temperament.delta import CodedLowRank, Delta, Dense, Lazy, LowRank, Rice
from temperament.delta.merge_run import Engine, Held, surveyed, tensors_of
from temperament.delta.merging import Block, Blockwise, Gather, Site
from temperament.delta.selection import keep_from, kth_largest
from temperament.delta.stream import Memory, Source
from temperament.parts import part


@part("merge.compeft", papers=["221"])
@dataclass(frozen=True)
class ComPEFT(Blockwise):
    """A change as signs and one number: the largest entries over all tensors keep their sign, their size is the same for all.

        t~ = alpha * sigma * sign(t) on the K = density * d largest |t| of all d entries together, else 0;   sigma = std of
        all of t by "mean": the size is the mean |t| of what is kept (the closest ternary vector)

    Low-rank changes are compressed in their factors A and B as they are: B began at 0, but where A began is not kept with a
    change, so A is compressed whole and not, as in the paper, since its start. On disk Rice-coded: about 0.9 bits an entry at
    density 0.2, 0.34 at 0.05. `alpha` is tuned on a few items; large models take 1. Source: Yadav et al.
    2023, ComPEFT (paper 221).
    """

    fewest = most = 1

    density: float = 0.2  # share of all entries that is kept
    alpha: float = 1.0  # size of a kept entry, in standard deviations of the change
    by: Literal["deviation", "mean"] = "deviation"  # what a kept entry's size is

    def __post_init__(self):
        if not 0 < self.density <= 1:
            raise ValueError(f"density lies in (0, 1], not {self.density}")

    def survey(self, sites: list[Site]):
        """(threshold, size) of the whole vector."""
        total = sum(site.numel for site in sites)
        count = min(max(round(self.density * total), 1), total)
        (cut,) = yield from kth_largest(max(sum(len(s.spans()) for s in sites), 2), total, [count])

        def sums(b: Block) -> torch.Tensor:
            x = b.x[0].double()
            kept = x.abs()[x.abs() >= cut]
            return torch.stack([x.sum(), x.square().sum(), kept.sum(), torch.tensor(float(len(kept)), dtype=torch.float64)])

        s, squares, sizes, kept = (float(v) for v in sum((yield Gather(sums))))
        deviation = max(squares / total - (s / total) ** 2, 0.0) ** 0.5
        return cut, self.alpha * (deviation if self.by == "deviation" else sizes / max(kept, 1))

    def plan(self, site: Site):
        cut, size = site.state
        return lambda b: keep_from(b.x[0], cut).sign_().mul_(size)

    def merge(self, base: Any, deltas: Sequence[Delta]) -> Delta:
        self.check(len(deltas))
        (delta,) = deltas
        source, delta = tensors_of(base), delta.baked()
        tensors = _tensors(delta, source)
        zero = Memory({n: torch.zeros(1).expand(t.shape) for n, t in tensors.items()})
        changes = Lazy(tensors, lambda n: Dense(tensors[n]))
        engine = Engine(self, Held([Delta(changes)], zero, "difference"))
        sites = surveyed(engine, {n: e.shape for n, e in zero.entries.items()}, 1, lambda name: 0.0)
        cut, size = sites[0].state if sites else (0.0, 0.0)

        def packed(name: str) -> Rice:
            tensor = tensors[name]
            return Rice.pack(keep_from(tensor.float().clone().view(-1), cut).view(tensor.shape), size)

        def made(name: str):
            if name in tensors:
                return packed(name)
            change = delta.changes[name]
            return CodedLowRank(packed(f"{name}:A"), packed(f"{name}:B"), change.layout, scale=change.scale)

        return replace(delta, changes={name: made(name) for name in sorted(delta.changes)})


def _tensors(delta: Delta, source: Source) -> Mapping[str, torch.Tensor]:
    """What is compressed: the factors of a change of low rank (name:A, name:B), the difference of any other; made when asked
    for."""
    made = {}
    for name in sorted(delta.changes):
        if isinstance(delta.changes[name], LowRank):
            made |= {f"{name}:{factor}": partial(lambda n, f: getattr(delta.changes[n], f), name, factor) for factor in "AB"}
        else:
            made[name] = partial(lambda n: delta.changes[n].delta(source.read(n)), name)
    return Lazy(made, lambda n: made[n]())
