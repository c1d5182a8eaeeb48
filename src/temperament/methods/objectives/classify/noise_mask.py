from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from temperament.engine import see
from temperament.engine.mask import log_beta, masked
from temperament.nn import draws
from temperament.nn.batch import Images
from temperament.parts import number, part
from temperament.protocols import Term, Terms


@part("objectives.classify.noise_mask", papers=["260"], modalities=("image",))
@dataclass(frozen=True)
class NoiseMask:
    """Classification of pictures of which a mask of light has been taken, drawn anew each time they come.

        loss = - log p(label | x * M(m)),   m_j ~ Beta(exp a_j(x), exp b_j(x))                mean over labelled pictures

    m (rows, grid * grid) is what another player's policy draws (`masker`, with adapters.mask_policy), or uniform noise where
    there is none; M: m made as large as the picture and blurred. What was drawn, and what each picture then cost, is left in
    the batch for objectives.policy.noise_mask. `official` multiplies the loss by the mean over pictures of
    log sum_j exp log p(m_j), as the released code does. Inference has no mask. Source: paper 260 (kernel 13, sigma 6, grid 64).
    """

    batch: ClassVar = ("Images",)
    masker: str | None = "masker"  # the player that draws, which comes after this one; null: uniform noise
    kernel: int = 13  # pixels the blur reaches over, odd
    sigma: float = 6.0  # of the blur, in pixels; 0: none
    grid: int = 64  # cells of a side, where no player draws
    mode: Literal["reinforce", "official"] = "reinforce"  # what the other player's loss is; `official` scales this one too
    head: str | None = None  # the head that is asked; null: the newest that was added, else the base's own
    policy: str = "mask"  # the other player's head

    def __post_init__(self):
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError("kernel must be odd and at least 1")
        if number(self.sigma, 0.0) < 0 or self.grid < 1:
            raise ValueError("sigma must not be negative, grid at least 1")
        if self.mode == "official" and self.masker is None:
            raise ValueError("mode is official, which needs a masker")

    def prepare(self, whole: Images, views: Any) -> Images:
        see.counted(whole)  # refuses pictures without labels
        step = views.progress.step
        if self.masker is None:
            whole.drawn = draws.uniform(views.seed, "mask", step, whole.examples, (self.grid**2,))
            return whole
        policy, base = views.head(f"{self.masker}:{self.policy}"), views.live.base
        raw = views.precompute(f"{self.masker}:live", whole, lambda m, r: policy(see.features(m, base, r.pixels)))
        a, b = policy.exponents(raw.to(policy.calmed)).exp().cpu().unbind(1)
        whole.drawn = draws.beta(a, b, views.seed, "mask", step, whole.examples)
        whole.cost = views.precompute("live", whole, lambda m, r: see.cost(self.logits(r, views), r.labels))
        if self.mode == "official":
            said = log_beta(whole.drawn, a, b).logsumexp(1)
            whole.weights = said.mean().expand(len(whole)).clone()
        return whole

    def counts(self, whole: Images) -> dict[str, float]:
        return see.counted(whole) | {"light": float(len(whole))}

    def loss(self, micro: Images, views: Any) -> Terms:
        terms = see.named(self.logits(micro, views), micro.labels, weights=micro.weights)
        return terms | {"light": Term(micro.drawn.mean(1), len(micro), weight=0)}

    def logits(self, rows: Images, views: Any) -> Tensor:
        head = self.head or see.newest(views.model)
        pixels = masked(rows.pixels, rows.drawn, self.kernel, self.sigma)
        return see.logits(views.model, views.live.base, pixels, head).float()
