from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from temperament.engine.denoise import Denoiser, Sampler, denoise, unsaid
from temperament.engine.discrepancy import Kernel, mmd
from temperament.errors import UserError
from temperament.nn.batch import Images
from temperament.parts import build, number, part
from temperament.protocols import Aide, Term, Terms


@part("objectives.diffusion.mmd", papers=["054"], modalities=("image",))
@dataclass(frozen=True)
class MMD:
    """Few-step sampling, learnt as a whole: what the sampler paints is to be distributed like the pictures of the batch.

        loss = MMD^2( phi(x_0(theta; z_i, c_i)), phi(y_i) ),    k(u, v) = (<u, v> / d + 1)^3        engine/discrepancy.py

    x_0: all `steps` of the sampler, each with its gradient, each recomputed in the backward; z_i noise, c_i the caption of row
    i, y_i its picture; phi frozen features of both. No sum over rows: the loop's two passes give the exact MMD of the *whole*
    batch whatever the micro-batches and processes (the paper takes one for each part). Only the painted half has a gradient.
    Sample with the same number of steps, guidance and eta afterwards (`inference: [sample.sampler: ...]`). Features that a
    metric is measured with are flattered by it: judge with others. Source: Aiello et al. 2024 (paper 054)."""

    steps: int = 5  # of the sampler that is taught
    eta: float = 0.0  # 0 certain, 1 ancestral
    guidance: float | None = None  # strength of the caption; none: as usual for the base
    features: Aide | None = None  # whose eyes: aides.encoder, aides.pixels; none: aides.random_features
    kernel: Kernel = "polynomial"  # how two features are compared
    degree: int = 3  # of the polynomial
    unsaid: float = 0.0  # share of captions left out; 1: the model without captions
    recompute: bool = True  # recompute activations of the steps instead of keeping them all

    batch: ClassVar = ("Images",)

    def __post_init__(self):
        if min(self.steps, self.degree) < 1:
            raise ValueError("steps and degree are at least 1")
        if not 0 <= number(self.unsaid, 0.0) <= 1:
            raise ValueError("unsaid is a share from 0 to 1")
        if self.features is not None and getattr(self.features, "role", "") != "features":
            raise ValueError("features must be an aide that gives features of pictures, e.g. aides.random_features")

    def counts(self, whole: Images) -> dict[str, float]:
        if len(whole) < 2:
            raise UserError("train.batch", len(whole), "a distribution of one picture is none; take at least 2")
        return {"mmd": len(whole)}

    def statistics(self, micro: Images, views: Any) -> Tensor:
        """(rows, 2, width): features of what is painted, and of the pictures themselves."""
        denoiser, eyes = Denoiser.of(views.live), self.features or build("aides.random_features")
        moving = torch.is_grad_enabled()
        captions = unsaid(micro, self.unsaid, views.seed)
        # Another draw than that of pictures which are measured: those are drawn with 0.
        made = denoise(denoiser, captions, self.sampler(denoiser), seed=views.seed, draw=1, ids=micro.examples.cpu(),
                       keep=self.steps if moving else 0, checkpoint=self.recompute)  # fmt: skip
        with torch.no_grad():
            real = eyes.ask(micro.pixels.to(denoiser.device))
        return torch.stack([eyes.ask(denoiser.pixels(made.latents)), real], 1)

    def couple(self, rows: Tensor) -> Terms:
        value = mmd(rows[:, 0], rows[:, 1].detach(), self.kernel, self.degree)
        return {"mmd": Term(value.to(rows.dtype) * len(rows), len(rows))}

    def sampler(self, denoiser: Denoiser) -> Sampler:
        usual = Sampler.usual(denoiser.process)
        guidance = usual.guidance if self.guidance is None else self.guidance
        return replace(usual, steps=self.steps, eta=self.eta, guidance=guidance)
