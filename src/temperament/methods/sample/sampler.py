from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from temperament.engine import denoise
from temperament.parts import part


@part("sample.sampler", modalities=("image",))
@dataclass(frozen=True)
class Sampler:
    """How pictures are made in this run: the steps of the one denoising loop (engine/denoise.py) and its guidance.

    DDIM at eta 0, ancestral sampling at eta 1; for a flow, Euler's method and its stochastic kin; a consistency model noises
    its estimate anew at every step, whatever eta. guidance g: u + g (c - u), c with the caption, u without; 1 asks the
    network once instead of twice. Without this part: 20 steps, eta 0, guidance 3 (a consistency model: 4 steps, guidance 1).
    Sources: Song et al. 2021, Ho & Salimans 2022."""

    steps: int = 20  # calls of the network
    eta: float = 0.0  # 0 certain, 1 ancestral
    guidance: float = 3.0  # how strongly the caption is followed; 1: as it is

    def __post_init__(self):
        if self.steps < 1 or self.eta < 0:
            raise ValueError("steps is at least 1, eta not negative")

    @property
    def sampler(self) -> denoise.Sampler:
        return denoise.Sampler(self.steps, self.eta, self.guidance)

    def hooks(self, base: Any) -> list[Any]:
        return []
