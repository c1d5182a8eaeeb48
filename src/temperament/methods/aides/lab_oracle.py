from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from temperament.bases import worlds
from temperament.errors import UserError
from temperament.parts import part


@part("aides.lab_oracle", modalities=("text",))
@dataclass(frozen=True)
class LabOracle:
    """A judge that knows the truth of the lab worlds: right by any way of saying it.

    For rows of data.lab; it parses, never evaluates.
    """

    role: ClassVar = "judge"

    def ask(self, requests: Sequence[Mapping[str, Any]]) -> list[bool]:
        if any("item" not in r.get("row", {}) for r in requests):
            raise UserError("aides.lab_oracle", "no item", "it judges rows of data.lab; use aides.match for rows of a file")
        return [worlds.skill(r["row"]["item"].skill).check(r["row"]["item"], r["output"]) for r in requests]
