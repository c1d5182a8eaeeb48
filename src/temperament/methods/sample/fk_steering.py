from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from temperament.engine.denoise import Hook, State
from temperament.engine.particles import Kind, Particles, Potential, moments
from temperament.errors import UserError
from temperament.nn import draws
from temperament.parts import part
from temperament.protocols import PictureReward

APART = 1 << 40  # between the ids of a caption's particles: the first one's noise is that of a plain sample


@part("sample.fk_steering", papers=["123"], modalities=("image",))
@dataclass(frozen=True)
class FKSteering:
    """Feynman-Kac steering: several particles a caption, weighed on the way by a reward, the promising ones copied (FK).

        target  p(x) exp(strength r(x));  on the way  r_i = r(estimate of the picture at step i)
        potentials diff, max, sum, their product and the last correction: engine/particles.py

    No gradient, no training: the reward may be anything that reads pictures. `particles` times the calls of the network, and
    the best picture of each caption is given (`give: draw`, one by its weight: a draw of the target as particles grow). Copies
    part only where steps are drawn, so `sample.sampler` needs eta above 0. Weigh where an estimate begins to foretell the
    picture: on blurs of many pictures, rewards are noise that max and sum never forget. times 0 is best-of-k. In the paper: k
    4, strength 10, potential max, 100 steps, resampled at 20, 40, 60 and 80. Source: Singhal et al. 2025 (paper 123)."""

    reward: PictureReward  # what a picture is worth
    particles: int = 4  # a caption
    strength: float = 10.0  # of the reward, in the exponent
    potential: Kind = "max"  # diff: what was gained since; max: the best so far; sum: all so far
    times: int = 4  # how often the particles are weighed on the way; 0: only at the end, best-of-k
    first: float = 0.2  # the first time, as a share of the steps
    last: float = 0.8  # and the last
    ess: float | None = None  # resample only where the effective number of particles is below this share; none: always
    start: float = 0.0  # the reward before the first time: the least there can be
    give: Literal["best", "draw"] = "best"  # the best particle, or one by its weight

    def __post_init__(self):
        if self.particles < 1 or self.times < 0 or not 0 <= self.first <= self.last <= 1:
            raise ValueError("particles is at least 1, times not negative, and 0 <= first <= last <= 1")
        if self.ess is not None and not 0 < self.ess <= 1:
            raise ValueError("ess lies in (0, 1]")

    def hooks(self, base: Any) -> list[Any]:
        return [_Steer(self)]


@dataclass
class _Steer(Hook):
    part: FKSteering
    crowd: Particles | None = None
    at: tuple[int, ...] = ()
    ids: torch.Tensor | None = None  # of the captions

    def begin(self, state: State) -> None:
        part, k = self.part, self.part.particles
        steps = len(state.times) - 1
        self.at, self.ids = tuple(moments(part.times, part.first, part.last, steps)), state.ids
        if k > 1 and self.at and state.sampler.eta == 0 and not state.denoiser.process.renoises:
            mend = "copies of a particle would never part; draw the steps (eta: 1.0), or take times: 0, which is best-of-k"
            raise UserError("sample.sampler.eta", 0.0, mend)
        self.crowd = Particles(Potential(part.potential, part.strength, part.start), len(self.ids), k, part.ess)
        state.select(torch.arange(len(self.ids)).repeat_interleave(k))
        state.ids = (self.ids[:, None] + APART * torch.arange(k)).flatten()
        if not state.placed:
            state.x = state.denoiser.process.start(state.noise("start"))

    def estimated(self, state: State) -> None:
        if state.step in self.at:
            places, purpose = torch.arange(self.part.particles), f"fk_steering/{state.step}"
            u = draws.uniform(state.seed, purpose, state.draw, self.ids[:, None], places)
            rows = self.crowd.weigh(self._rewards(state, state.clean), u)
            if rows is not None:
                state.select(rows)

    def end(self, state: State) -> None:
        self.crowd.finish(self._rewards(state, state.x))
        chosen = self.crowd.best()
        if self.part.give == "draw":
            chosen = self.crowd.drawn(draws.uniform(state.seed, "fk_steering/draw", state.draw, self.ids))
        state.select(chosen)
        state.ids = self.ids

    def _rewards(self, state: State, latents: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found = self.part.reward.value(state.denoiser.pixels(latents), state.captions)
        return found.view(len(self.ids), -1)
