from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from temperament.parts import part


@part("decode.repetition_penalty", modalities=("text",))
@dataclass(frozen=True)
class RepetitionPenalty:
    """Logits of tokens already written are made less likely: z <- z / p where z > 0, z * p where z < 0.

    Source: Keskar et al. 2019 (CTRL). p = 1 changes nothing.
    """

    penalty: float = 1.2  # p

    def __post_init__(self):
        if self.penalty <= 0:
            raise ValueError("penalty must be above 0")

    def hooks(self, base: Any) -> list[Any]:
        return [_Penalty(self.penalty)]


@dataclass(frozen=True)
class _Penalty:
    penalty: float

    def logits(self, state: Any) -> torch.Tensor:
        z = state.chosen.clone()  # what the hooks before this one made of the logits
        for row, ids in enumerate(state.ids):
            if ids:
                seen = torch.tensor(sorted(set(ids)), device=z.device)
                values = z[row, seen]
                z[row, seen] = torch.where(values > 0, values / self.penalty, values * self.penalty)
        return z
