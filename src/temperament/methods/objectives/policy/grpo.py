from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from temperament.nn.batch import Rollout
from temperament.parts import number, part
from temperament.protocols import Term, Terms


@part("objectives.policy.grpo", modalities=("text", "control", "image"))
@dataclass(frozen=True)
class GRPO:
    """Group-relative policy optimisation.

        A_i = (r_i - mean(r)) / (std(r) + eps)                       over the responses to one prompt (std unbiased)
        rho_t = exp(log pi(y_t) - log pi_old(y_t))
        loss = - sum_t min(rho_t A, clip(rho_t, 1 - e_low, 1 + e_high) A) / count  +  beta * KL(pi || reference)

    count: all sampled tokens of the batch (`token`, as DAPO), or each response averaged first (`sequence`, the first paper),
    or a constant (`constant`: responses x max_new, as Dr. GRPO). KL is the k3 estimator exp(d) - d - 1 with d = ref - pi per
    token, nats. scale: divide by the group's standard deviation, or not (Dr. GRPO). A group whose rewards are all equal has
    A = 0 and teaches nothing. Source: Shao et al. 2024 (DeepSeekMath); Yu et al. 2025 (DAPO); Liu et al. 2025 (Dr. GRPO)."""

    batch: ClassVar = ("Rollout",)
    clip_low: float = 0.2  # the ratio is clipped below 1 - clip_low
    clip_high: float = 0.2  # and above 1 + clip_high
    beta: float = 0.0  # weight of the KL to the reference; 0 scores no reference
    reference: str = "start"  # version the KL is taken to
    scale: bool = True  # divide advantages by the standard deviation of their group
    per: Literal["token", "sequence", "constant"] = "token"  # what the sum is divided by
    max_new: int = 256  # tokens a response could have had (only for per: constant)
    eps: float = 1e-4  # added to the standard deviation

    def __post_init__(self):
        if self.max_new < 1:
            raise ValueError("max_new must be at least 1")
        if min(number(v, 0.0) for v in (self.clip_low, self.clip_high, self.eps)) < 0:
            raise ValueError("clip_low, clip_high and eps must not be negative")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.reference,) if self.beta else ()

    def prepare(self, whole: Rollout, views) -> Rollout:
        whole.advantages = group_advantages(whole.total, whole.group, self.scale, self.eps)[:, None]
        if self.beta:
            whole.reference = views.precompute(self.reference, whole, lambda m, r: r.tokens.logp(m))
        if self.per == "sequence":
            whole.tokens = whole.tokens.per_example()
        return whole

    def counts(self, whole: Rollout) -> dict[str, float]:
        n = len(whole) * self.max_new if self.per == "constant" else whole.tokens.trained
        counts = {"policy": n, "clipped": n, "reward": len(whole)}
        return counts | ({"kl": n} if self.beta else {})

    def loss(self, micro: Rollout, views) -> Terms:
        w, n = micro.tokens.weights, micro.tokens.trained
        logp = micro.tokens.logp(views.model)
        ratio = torch.exp(logp - micro.behaviour)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        gain = torch.minimum(ratio * micro.advantages, clipped * micro.advantages)
        terms = {
            "policy": Term(-gain * w, n),
            "clipped": Term((ratio.detach() != clipped.detach()).float() * w, n, weight=0),
            "reward": Term(micro.rewards, len(micro), weight=0),
        }
        if self.beta:
            d = micro.reference - logp
            terms["kl"] = Term((torch.exp(d) - d - 1) * w, n, weight=self.beta)
        return terms


def group_advantages(rewards: torch.Tensor, group: torch.Tensor, scale: bool, eps: float) -> torch.Tensor:
    """(rows,): each reward less the mean of its group, over the unbiased standard deviation of the group when `scale`."""
    _, inverse, size = torch.unique(group, return_inverse=True, return_counts=True)
    total = torch.zeros(len(size), dtype=rewards.dtype).index_add_(0, inverse, rewards)
    centred = rewards - (total / size)[inverse]
    if not scale:
        return centred
    variance = torch.zeros_like(total).index_add_(0, inverse, centred**2) / (size - 1).clamp(min=1)
    return centred / (variance.sqrt()[inverse] + eps)
