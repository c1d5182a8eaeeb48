from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from temperament.engine.denoise import Denoiser, addressed, covered
from temperament.engine.noise import share
from temperament.nn.batch import Images
from temperament.parts import number, part
from temperament.protocols import Term, Terms


@part("objectives.diffusion.denoise", papers=["274"], modalities=("image",))
@dataclass(frozen=True)
class Denoise:
    """A generator's own loss: say what was covered with noise.

        loss = mean_i  w(t_i) |f(a x_i + s n_i, t_i, c_i) - y_i|^2 / d      over the rows that are to be learnt
             + prior * the same mean over rows the base made itself

    y: the noise, the velocity or the picture, as the base's scheduler says (engine/noise.py: epsilon, v, flow); d entries of
    a picture or its latents. Noise and times are addressed by (seed, row): any split gives the same gradient. The second
    term, with its own count, is DreamBooth's prior preservation (`data.prior_preservation` makes such rows); at the base it
    is at its optimum, so it pulls only against what the first one changes. min-SNR weights: min(snr, gamma) times the squared
    error of the picture, whatever the network says; snr = a^2 / s^2 (Hang et al. 2023). Source: Ho et al. 2020; Ruiz et al.
    2023 (paper 274)."""

    prior: float = 1.0  # weight of the rows the base made itself
    unsaid: float = 0.0  # share of captions left out, so that guidance keeps its ground
    min_snr: float | None = None  # gamma; None: every time counts the same

    batch: ClassVar = ("Images",)

    def __post_init__(self):
        if number(self.prior, 1.0) < 0 or not 0 <= number(self.unsaid, 0.0) <= 1 or number(self.min_snr, 1.0) <= 0:
            raise ValueError("prior is not negative, unsaid a share from 0 to 1, min_snr above 0")

    def counts(self, whole: Images) -> dict[str, float]:
        kept = 0 if whole.prior is None else int(whole.prior.sum())
        return {"mse": len(whole) - kept, "prior": kept}

    def loss(self, micro: Images, views) -> Terms:
        denoiser = Denoiser.of(views.live)
        row = covered(denoiser, micro, views.seed, self.unsaid)
        with addressed(micro.examples):
            said = denoiser(row.x, row.t, denoiser.encode(row.captions))
        error = (said - row.target).square().flatten(1).mean(1) * self._weight(denoiser, row.t)
        kept = (micro.prior if micro.prior is not None else row.t < -1).to(error.device)
        return {
            "mse": Term(error * ~kept, int((~kept).sum())),
            "prior": Term(error * kept, int(kept.sum()), self.prior),
        }

    def _weight(self, denoiser: Denoiser, t):
        if self.min_snr is None:
            return 1.0
        a, s = denoiser.process.scales(t)
        snr = (a / s.clamp(min=1e-4)).square()
        return snr.clamp(max=self.min_snr) * share(denoiser.process, t).square().to(snr)
