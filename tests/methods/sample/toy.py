"""Denoisers of which everything is known: the best one for a Gaussian, and small real ones with a change on them."""

from types import SimpleNamespace

import torch
from torch import nn

from temperament.bases import train_diffusion as lab
from temperament.bases.load import Base
from temperament.delta import Delta, Dense
from temperament.engine.noise import process_of

SCHEDULE = {"_class_name": "DDIMScheduler", "num_train_timesteps": 200, "beta_start": 1e-3, "beta_end": 0.1}


class Gaussian(nn.Module):
    """The denoiser of N(mean, 1), (rows, 1, 1, 1): x_t ~ N(a mean, 1), so its noise is expected to be s (x_t - a mean)."""

    config = SimpleNamespace(in_channels=1, sample_size=1)

    def __init__(self, mean, predicts):
        super().__init__()
        self.mean = nn.Parameter(torch.full((1,), float(mean)))
        self.process = process_of({**SCHEDULE, "prediction_type": predicts})

    def forward(self, sample, timestep, return_dict=False):
        a, s = (v.view(-1, 1, 1, 1) for v in self.process.scales(timestep))
        noise = s * (sample - a * self.mean)
        clean = a * sample + s * s * self.mean  # the same belief about the picture
        return ({"epsilon": noise, "v_prediction": a * noise - s * clean, "sample": clean}[self.process.predicts],)


def gaussian(mean, predicts="epsilon") -> Base:
    net = Gaussian(mean, predicts)
    base = Base("toy", {"denoiser": net}, {"scheduler": {**SCHEDULE, "prediction_type": predicts}}, sha256={"-": "-"})
    return base


def moved(base: Base, names: tuple[str, ...], size: float = 0.05) -> Base:
    """The base with a random change applied to what these names begin."""
    chosen = {n: p for n, p in base.parameters() if n.startswith(names)}
    base.apply(Delta({n: Dense(size * torch.randn_like(p)) for n, p in chosen.items()}))
    return base


def small(kind: str = "unet", seed: int = 0) -> Base:
    return lab.fresh(kind, seed)
