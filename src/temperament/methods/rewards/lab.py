from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from temperament.bases import worlds
from temperament.errors import UserError
from temperament.parts import part


@part("rewards.lab", modalities=("text",))
@dataclass(frozen=True)
class LabOracle:
    """The lab world's own verdict on the response: 1 right, 0 wrong. For rows of `data.lab`."""

    def score(self, prompt: Any, outputs: Sequence[str], row: Mapping[str, Any]) -> list[float | None]:
        if "item" not in row:
            raise UserError(
                "rewards.lab", sorted(map(str, row)), "it judges rows of data.lab; use rewards.exact for rows of a file"
            )
        skill = worlds.skill(row["item"].skill)
        return [float(skill.check(row["item"], o)) for o in outputs]
