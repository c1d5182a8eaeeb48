from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from temperament.engine.responses import in_turn
from temperament.engine.rows import fingerprint
from temperament.errors import UserError
from temperament.nn.batch import Captions
from temperament.parts import part


@part("data.captions", modalities=("image",))
@dataclass(frozen=True)
class CaptionList:
    """Captions alone, for objectives that let the model paint: from the recipe, from a file of one a line, or both.

    Every epoch in an order of its own; a caption that comes again is painted from other noise."""

    captions: list[str] = field(default_factory=list)  # as they are asked
    path: str | None = None  # a text file, one caption a line

    yields: ClassVar = ("Captions",)

    def fingerprint(self) -> str:
        return fingerprint(self.path) if self.path else ""

    def read(self) -> list[str]:
        found = list(self.captions)
        if self.path is not None:
            file = Path(self.path).expanduser()
            if not file.is_file():
                raise UserError("data.captions.path", self.path, "no such file; give a text file with one caption a line")
            found += [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if not found:
            raise UserError("data.captions.captions", found, "give at least one caption, or a file of them with path")
        return found

    def open(self, ctx: Any) -> _Stream:
        return _Stream(self.read(), ctx)


class _Stream:
    def __init__(self, captions: list[str], ctx: Any):
        self.captions, self.ctx = captions, ctx
        self.steps_per_epoch = -(-len(captions) // ctx.batch)

    def batch(self, step: int, progress: Any = None) -> Captions:
        k = self.ctx.batch
        rows = in_turn(len(self.captions), k, step * k, self.ctx.seed, "captions")
        return Captions(torch.arange(step * k, step * k + k), [self.captions[r] for r in rows])

    def largest(self) -> Captions:
        return self.batch(0)
