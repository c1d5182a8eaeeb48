from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from temperament.delta import Delta, Replace
from temperament.engine.pictures import normalised
from temperament.errors import UserError
from temperament.nn.batch import Images
from temperament.nn.norms import counted, counting_anew
from temperament.parts import build, part
from temperament.protocols import Merge, Source
from temperament.train.context import Context
from temperament.train.world import World


@part("merge.norm_statistics", papers=["120"], modalities=("image",), declares=["couples the batch"])
@dataclass(frozen=True)
class NormStatistics:
    """A merge whose batch norms are measured again: the mean of weights has other activations than the mean of models.

        mu, sigma^2 of each channel  <-  their means over batches of pictures, read by the merged model

    A wrapper on any merge (`of`), also one that searches: then every candidate is measured before it is scored. Statistics are
    buffers of the change, so a base has its own back. In a batch each layer normalises by that batch, as in training. A base
    without batch norms is only merged. Source: Wortsman et al. 2022, Model soups (paper 120), for networks with BatchNorm.
    """

    data: Source  # pictures that are read; best those of training, as no label is looked at
    of: Merge | None = None  # the merge; null: the mean
    batches: int = 8  # how many are read
    rows: int = 64  # pictures of a batch

    def __post_init__(self):
        if self.batches < 1 or self.rows < 2:
            raise ValueError("batches is at least 1, rows at least 2")

    @property
    def inner(self) -> Any:
        return self.of or build("merge.linear", Merge)

    def merge(self, base: Any, deltas: Sequence[Delta]) -> Delta:
        return self.measured(base, self.inner.merge(base, deltas))

    def search(self, base: Any, deltas: Sequence[Delta], score: Callable[[Delta], float]) -> tuple[Delta, dict[str, Any]]:
        if not hasattr(self.inner, "search"):
            return self.merge(base, deltas), {}
        merged, tried = self.inner.search(base, deltas, lambda delta: score(self.measured(base, delta)))
        return self.measured(base, merged), tried

    @torch.no_grad()
    def measured(self, base: Any, delta: Delta) -> Delta:
        """The same change with the statistics that its weights have."""
        norms = counted(base.components.values())
        if not norms:
            return delta
        own = {id(b) for m in norms for b in m.buffers(recurse=False)}
        held = {name: (b, b.clone()) for name, b in base.buffers() if id(b) in own}
        base.reset()
        base.apply(delta)
        try:
            with counting_anew(norms):
                for rows in self.pictures(base):
                    base.model(pixel_values=normalised(base, rows.pixels.to(next(base.model.parameters()).device)))
            found = {name: b.clone() for name, (b, _) in held.items() if b.is_floating_point()}
        finally:
            for b, was in held.values():
                b.copy_(was)
            base.reset()
        # A strength below 1 would hold for the weights and not for what was measured at them.
        return replace(delta.baked(), buffers={**delta.baked().buffers, **{n: Replace(b) for n, b in found.items()}})

    def pictures(self, base: Any) -> list[Images]:
        stream = self.data.open(Context(base, World(), batch=self.rows))
        batches = [stream.batch(step) for step in range(self.batches)]
        if any(not isinstance(b, Images) for b in batches):
            raise UserError("merge.norm_statistics.data", type(self.data).part_name, "give a source of pictures")
        return batches
