from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from temperament.engine.stream import Mixture, Stream, mix
from temperament.errors import UserError
from temperament.parts import part
from temperament.protocols import Source


@part("data.mix")
@dataclass(frozen=True)
class Mix:
    """Several sources in fixed proportions: new examples with a little of what the model should keep, say.

        rows of source i in steps 0..k  =  batch * (k + 1) * weight_i / sum(weights),  rounded by largest remainder

    The shares are exact over time and no draw decides them. Each source keeps its own order and begins again when it is
    through; an epoch ends when all have been seen. Every row keeps the name of its source.
    """

    yields: ClassVar = ("Tokens", "Pairs", "Labelled")

    sources: list[Source]  # what is mixed: data.file, ...
    weights: list[float] = field(default_factory=list)  # one for each source; default: equal

    def __post_init__(self):
        if not self.sources:
            raise ValueError("sources: name at least one")
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(f"weights: give one for each of the {len(self.sources)} sources")

    def suites(self) -> list[Any]:
        return [s for source in self.sources if hasattr(source, "suites") for s in source.suites()]

    def open(self, ctx: Any) -> Mixture:
        streams = [source.open(ctx) for source in self.sources]
        for source, stream in zip(self.sources, streams, strict=True):
            if not isinstance(stream, Stream):
                raise UserError("data.mix.sources", type(source).part_name, "it has no rows of its own to mix; use data.file")
        weights = self.weights or [1.0] * len(streams)
        mixture = mix(list(zip(streams, weights, strict=True)), ctx.batch)
        mixture.yields = streams[0].yields
        return mixture
