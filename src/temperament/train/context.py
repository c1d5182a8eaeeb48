"""What a part is given when it is built: the base, the processes, the seed, and where it may keep what it prepares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temperament.errors import UserError, nearest

if TYPE_CHECKING:
    from temperament.bases.load import Base
    from temperament.delta import Delta
    from temperament.train.live import Live
    from temperament.train.loop import Views
    from temperament.train.world import World


@dataclass
class Context:
    """batch, micro: rows of an optimizer step, rows of a forward. live, views: the main player, once it is built (a source
    may generate with it). artefacts: folders of earlier steps, and files of rows that were built, by name. round: number of
    the round this step is in; before: what this same step left in the round before. folder: scratch that is kept with the
    step; key: address of what makes the step. prepared: what the part now being built learnt from the data. tell: event sink
    for progress that takes long."""

    base: Base
    world: World
    seed: int = 0
    batch: int = 16
    micro: int = 16
    folder: Path | None = None
    key: str = ""
    prepared: Mapping[str, Any] = field(default_factory=dict)
    round: int = 0
    live: Live | None = None
    views: Views | None = None
    aides: Mapping[str, Any] = field(default_factory=dict)
    inference: Sequence[Any] = ()
    artefacts: Mapping[str, Path] = field(default_factory=dict)
    before: Path | None = None
    tell: Callable[..., None] = lambda event, **data: None

    def delta(self, step: str, field: str = "of") -> Delta:
        """The change from the pure base to where an earlier step ended. A part that reads one names it in its `inputs`."""
        from temperament.delta import Delta

        if step not in self.artefacts:
            raise UserError(field, step, f"no step before this one left a change of that name; {nearest(step, self.artefacts)}")
        return Delta.load(Path(self.artefacts[step]) / "delta")
