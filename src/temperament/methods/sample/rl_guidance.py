from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from temperament.engine.denoise import Hook, State
from temperament.engine.measure import Pure
from temperament.parts import part


@part("sample.rl_guidance", papers=["039"], modalities=("image",))
@dataclass(frozen=True)
class RLGuidance:
    """How much of a tuning a sampler follows: the tuned network guided against its own base, at every step (RLG).

        out = v_base + weight (v_tuned - v_base)         out: whatever the network says: noise, velocity or picture, all affine

    0 is the base, 1 the tuned model, above 1 more of the tuning than was trained. Sampling is then from
    p_base^(1-w) p_tuned^w, up to what guidance always neglects; where tuning was a reward under a KL penalty of beta, that is
    the same reward under beta / w. Each of the two is first guided by its caption (`sample.sampler`), with its own text
    encoder: two networks are asked at each step, four with guidance. What counts as tuning is what the steps before left; a
    look while an adapter trains sees that adapter whole. Not the dial: that scales weights. Source: paper 039."""

    weight: float = 2.0  # 0 the base, 1 the tuned model; 1.2 to 3 were found useful
    alone: int = 0  # first steps that the tuned model takes alone

    def __post_init__(self):
        if self.alone < 0:
            raise ValueError("alone must not be negative")

    def hooks(self, base: Any) -> list[Any]:
        return [_Against(self, Pure(base))]


@dataclass
class _Against(Hook):
    part: RLGuidance
    reference: Any
    state: State | None = None

    def begin(self, state: State) -> None:
        self.state = state

    def around(self, predict: Callable) -> Callable:
        part, w = self.part, self.part.weight

        def combined(x: Tensor, t: Tensor, conditions: dict[str, Tensor], version: Any = None) -> Tensor:
            if version is not None or w == 1 or self.state.step < part.alone:
                return predict(x, t, conditions, version)
            plain = predict(x, t, self.state.read(self.reference), self.reference)
            return plain if w == 0 else torch.lerp(plain, predict(x, t, conditions), w)

        return combined
