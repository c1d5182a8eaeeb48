from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from temperament.engine import record
from temperament.engine.measure import System, content_key
from temperament.engine.pictures import Picture, size_of
from temperament.methods.evaluate.pictures import PictureSkill
from temperament.parts import part
from temperament.protocols import Outcome, Visited


@dataclass(frozen=True)
class OnlineSkill(PictureSkill):
    """Pictures of a stream. Of a step that adapted to them, what it said of each before it learnt from it - those it had not
    met when it was ended count for nothing; of any other system, what it says of them as it stands."""

    places: tuple[int, ...] = ()  # number of each picture in the stream
    metric: str = "accuracy, adapting"

    def key(self) -> str:
        return content_key("prequential", super().key(), self.places)

    def some(self, n: int) -> OnlineSkill:
        return replace(self, pictures=self.pictures[:n], places=self.places[:n])

    def measure(self, system: System) -> list[Outcome]:
        said = self.recorded(system)
        if said is None:
            return super().measure(system)
        size, rows = size_of(system.base), zip(self.pictures, said, strict=True)
        told = lambda p, row: self._outcome(p, p.pixels(size), row, None, system.graded)
        return [told(p, row) if bool(row.isfinite().all()) else self._unmet(p) for p, row in rows]

    def _unmet(self, p: Picture) -> Outcome:
        return Outcome(p.id, self.name, p.caption, self.classes[p.label], "(not met)")

    def recorded(self, system: System) -> Tensor | None:
        """(rows, classes) log-probs, nats; NaN of pictures that were not met."""
        if system.folder is None or system.model is not None:
            return None
        found = record.kept(system.folder / record.SCRATCH, system.key)
        said = None if found is None else found.get("said")
        if said is None or len(said) <= max(self.places) or said.shape[1] != len(self.classes):
            return None
        return said[torch.tensor(self.places)]


@part("evaluate.prequential", papers=["200"], modalities=("image",), declares=["adapts at test time"])
@dataclass(frozen=True)
class Prequential:
    """Accuracy on a stream, each picture asked before it is learnt from: one skill a domain, over all its visits.

    The row of a step that adapted to the stream holds what was said then, while the model moved; the base's row, and that of
    any other step, what a model that stands still says. So before and after are the same pictures without and with adapting.
    It says nothing of how the adapted model does on other pictures: for that name other suites beside it.
    """

    of: Visited  # the stream: rollout.test_stream as in the train step
    role: Literal["target", "retained"] = "target"  # what the ledger calls it
    items: int | None = None  # pictures of a domain at most, from the first; default: all of them

    def skills(self, ctx: Any) -> list[OnlineSkill]:
        classes, met, by = tuple(self.of.classes(ctx.base)), 0, {}
        for visit, (name, pictures) in enumerate(self.of.visits(ctx.base)):
            asked = [(replace(p, id=f"{visit}/{p.id}"), met + i) for i, p in enumerate(pictures)]
            by.setdefault(name, []).extend(asked)
            met += len(pictures)
        cut = {name: rows[: self.items] for name, rows in by.items()}
        made = []
        for name, rows in cut.items():
            pictures, places = zip(*rows, strict=True)
            made.append(OnlineSkill(f"{name}, adapting", pictures, classes, role=self.role, places=places))
        return made
