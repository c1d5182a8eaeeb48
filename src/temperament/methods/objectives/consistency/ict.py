from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from temperament.engine import consistency
from temperament.engine.denoise import Denoiser, addressed, unsaid
from temperament.errors import UserError
from temperament.nn.batch import Images
from temperament.parts import number, part
from temperament.protocols import Term, Terms


@part("objectives.consistency.ict", papers=["007"], modalities=("image",))
@dataclass(frozen=True)
class ICT:
    """Improved consistency training: what the network makes of two neighbouring noise levels of one path is drawn together.

        loss = mean_rows  d( f(x_s', s') - stop f(x_s, s) ) / (s' - s)      s < s' neighbours, x_s = x + s n with one n
        d(u) = sqrt(|u|^2 + c^2) - c,   c = huber * sqrt(entries of a picture)

    The teacher is the same network without gradient, under the same dropout. Pairs are drawn as if ln s were normal; their
    number is doubled from `first` to `last` over the run (engine/consistency.py has the formulas). Levels are noise over
    signal, from the least to the most of the base's process; at the least f is what it is given. Level, noise and
    dropout are addressed by (seed, row): any split gives the same gradient.

    The first paper's training is teacher: ema (with train.ema 0.95), huber: null, spread: null, weigh: false, first = last.
    solver: base makes it distillation: the second point is where a guided step of that version leads (latent consistency
    models). Sources: Song & Dhariwal 2023 (paper 007); Song et al. 2023; Luo et al. 2023."""

    first: int = 10  # pairs of levels at the start
    last: int = 1280  # and at the end; the same number: no curriculum
    mean: float = -1.1  # of ln s, by which pairs are drawn
    spread: float | None = 2.0  # its standard deviation; None: every pair as often
    huber: float | None = 0.00054  # c over the square root of a picture's entries; None: the square of the distance
    weigh: bool = True  # divide by the distance of the levels
    teacher: str = "live"  # version that says where the path ends: live, or ema
    unsaid: float = 0.0  # share of captions left out
    solver: str | None = None  # version whose step leads to the second point, e.g. base; None: the same noise
    guidance: float = 1.0  # of the solver

    batch: ClassVar = ("Images",)

    def __post_init__(self):
        if isinstance(self.first, int) and isinstance(self.last, int) and not 2 <= self.first <= self.last:
            raise ValueError("first is at least 2 and at most last")
        if number(self.spread, 1.0) <= 0:
            raise ValueError("spread must be above 0; null draws every pair as often")
        if number(self.huber, 1.0) <= 0:
            raise ValueError("huber must be above 0; null takes the square of the distance")
        if not 0 <= number(self.unsaid, 0.0) <= 1:
            raise ValueError("unsaid is a share from 0 to 1")

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(v for v in (self.teacher, self.solver) if v not in (None, "live"))

    def counts(self, whole: Images) -> dict[str, float]:
        return {"consistency": len(whole), "levels": len(whole)}

    def loss(self, micro: Images, views) -> Terms:
        denoiser, rows = Denoiser.of(views.live), len(micro)
        if not denoiser.process.renoises:
            mend = "its scheduler is of diffusion; use a consistency model (LCMScheduler or CMStochasticIterativeScheduler)"
            raise UserError("objectives.consistency.ict", denoiser.base.id, mend)
        sigmas = self.sigmas(denoiser, views.progress)
        chance = consistency.chances(sigmas, self.mean, self.spread)
        x, captions = denoiser.latents(micro.pixels.to(denoiser.device)), unsaid(micro, self.unsaid, views.seed)
        two = consistency.pair(denoiser, x, micro.examples, views.seed, sigmas, chance)
        with addressed(micro.examples):
            student = denoiser.clean(two.noisier, two.then, denoiser.encode(captions))
            with torch.no_grad():
                if self.solver is not None:
                    two = self._led(two, captions, views)
                teacher = denoiser if self.teacher == "live" else Denoiser.of(views.view(self.teacher))
                with teacher.active():
                    wanted = teacher.clean(two.cleaner, two.now, teacher.encode(captions))
        error = self.distance(student - wanted)
        if self.weigh:
            error = error / two.apart.to(error)
        return {
            "consistency": Term(error, rows),
            "levels": Term(torch.full((rows,), float(len(sigmas))), rows, weight=0),
        }

    def sigmas(self, denoiser: Denoiser, progress) -> Tensor:
        """The levels of this moment."""
        count = consistency.doubled(progress.step, progress.total, int(self.first), int(self.last))
        return consistency.levels(denoiser.process, count)

    def distance(self, u: Tensor) -> Tensor:
        if self.huber is None:
            return u.flatten(1).square().sum(1)
        return consistency.pseudo_huber(u, self.huber * math.sqrt(u[0].numel()))

    def _led(self, two: consistency.Pair, captions: list[str], views) -> consistency.Pair:
        solver = Denoiser.of(views.view(self.solver))
        with solver.active():
            nothing = solver.encode([""]) if self.guidance != 1 else {}
            return consistency.led(solver, two, solver.encode(captions), nothing, self.guidance)
