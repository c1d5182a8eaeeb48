from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from temperament.engine.denoise import Denoiser, Sampler, denoise
from temperament.nn import draws
from temperament.nn.batch import Captions, Images
from temperament.parts import part
from temperament.protocols import PictureReward, Term, Terms


@part("objectives.diffusion.reward_backprop", papers=["064"], modalities=("image",))
@dataclass(frozen=True)
class RewardBackprop:
    """A reward's own gradient, back through the last steps of the sampler (AlignProp).

        loss = - mean_i  sum_r w_r r(x_0(theta; z_i, c_i), c_i)        z_i the noise of row i, c_i its caption
        x_0: all `steps` of the chain are taken, the last K keep their graph; K ~ U{least..most} anew at each training step

    most = steps and least = most: the whole chain, which learns fast and then paints one picture for all; K = 1: the last step
    only, which can change textures and no composition (DRaFT-1). A K drawn each time does not let the model settle on either
    and keeps pictures of one caption apart for longer. least 0, as the paper draws it, spends a step on nothing now and then.
    The steps that keep their graph recompute their activations, so memory is that of one step. Rewards, codec and whatever is
    not in the trainable stay as they are; several rewards are summed, each logged under its own name. Needs a reward with a
    gradient (`value`, protocols.PictureReward). Source: Prabhudesai et al. 2023 (paper 064); K fixed: Clark et al. 2023."""

    rewards: list[PictureReward]  # what a picture is worth
    weights: list[float] = field(default_factory=list)  # of the rewards, in their order; none: 1 each
    steps: int = 20  # calls of the network in a chain
    guidance: float | None = None  # strength of the caption; none: as usual for the base
    eta: float = 0.0  # 0 certain, 1 ancestral
    least: int = 1  # steps at the end of the chain that keep their graph, at least
    most: int | None = None  # and at most; none: all
    recompute: bool = True  # those steps recompute their activations instead of keeping them

    batch: ClassVar = ("Captions", "Images")

    def __post_init__(self):
        if not self.rewards or (self.weights and len(self.weights) != len(self.rewards)):
            raise ValueError("name at least one reward, and as many weights as rewards or none")
        if self.steps < 1 or not 0 <= self.least <= (self.steps if self.most is None else self.most) <= self.steps:
            raise ValueError("steps is at least 1, and 0 <= least <= most <= steps")

    def counts(self, whole: Captions | Images) -> dict[str, float]:
        return dict.fromkeys(self._names(), len(whole))

    def loss(self, micro: Captions | Images, views: Any) -> Terms:
        denoiser = Denoiser.of(views.live)
        captions = micro.captions or [""] * len(micro)
        made = denoise(denoiser, captions, self.sampler(denoiser), seed=views.seed, ids=micro.examples.cpu(),
                       keep=self.kept(views.seed, views.progress.step), checkpoint=self.recompute)  # fmt: skip
        weights = self.weights or [1.0] * len(self.rewards)
        values = [r.value(made.pixels, captions) for r in self.rewards]
        # A reward is logged as it is, and its loss is what it lacks: the weight carries the sign.
        return {n: Term(v, len(micro), -w) for n, v, w in zip(self._names(), values, weights, strict=True)}

    def sampler(self, denoiser: Denoiser) -> Sampler:
        usual = Sampler.usual(denoiser.process)
        guidance = usual.guidance if self.guidance is None else self.guidance
        return replace(usual, steps=self.steps, eta=self.eta, guidance=guidance)

    def kept(self, seed: int, step: int) -> int:
        """K of a training step, the same for all its rows."""
        most = self.steps if self.most is None else self.most
        return self.least + int(draws.randint(most - self.least + 1, seed, "reward_backprop/keep", step, torch.tensor([0])))

    def _names(self) -> list[str]:
        names = [type(r).part_name.rpartition(".")[2] for r in self.rewards]
        return [n if n not in names[:i] else f"{n}-{names[: i + 1].count(n)}" for i, n in enumerate(names)]
