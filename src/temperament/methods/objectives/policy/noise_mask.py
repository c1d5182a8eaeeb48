from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from temperament.engine import see
from temperament.engine.mask import log_beta
from temperament.errors import UserError
from temperament.nn.batch import Images
from temperament.parts import part
from temperament.protocols import Term, Terms


@part("objectives.policy.noise_mask", papers=["260"], modalities=("image",))
@dataclass(frozen=True)
class MaskScore:
    """The policy that draws masks learns to draw those under which the other player errs less: a score-function gradient.

        loss = (c_i - c) mean_j log Beta(m_ij; exp a_ij, exp b_ij)                           mean over pictures i

    m, c_i: what objectives.classify.noise_mask drew and what each picture then cost, nats; c: the running mean of the cost. Its
    gradient is that of the expected cost, divided by the cells. `official` is the released code's: the mean cost of the batch
    times the mean over pictures of log sum_j exp log p(m_ij). For a player with adapters.mask_policy that comes after the one
    that classifies. Source: Williams 1992; paper 260.
    """

    batch: ClassVar = ("Images",)
    mode: Literal["reinforce", "official"] = "reinforce"  # as in the other player's objective
    head: str = "mask"  # which head of this player

    def prepare(self, whole: Images, views: Any) -> Images:
        if whole.drawn is None or whole.cost is None:
            mend = "the player that classifies must leave them: use objectives.classify.noise_mask there, with this masker"
            raise UserError("objectives.policy.noise_mask", "no masks", mend)
        policy, base = views.head(self.head), views.live.base
        raw = views.precompute("live", whole, lambda m, r: policy(see.features(m, base, r.pixels)))
        policy.note(raw.to(policy.calmed), whole.cost)
        if self.mode == "official":
            whole.cost = whole.cost.mean().expand(len(whole)).clone()
        return whole

    def counts(self, whole: Images) -> dict[str, float]:
        return dict.fromkeys(("mask", "cost"), float(len(whole)))

    def loss(self, micro: Images, views: Any) -> Terms:
        policy, n = views.head(self.head), len(micro)
        a, b = policy.exponents(policy(see.features(views.model, views.live.base, micro.pixels).float())).exp().unbind(1)
        logp = log_beta(micro.drawn, a, b)
        if self.mode == "official":
            value: Tensor = micro.cost * logp.logsumexp(1)
        else:
            value = (micro.cost - policy.baseline()) * logp.mean(1)
        return {"mask": Term(value, n), "cost": Term(micro.cost, n, weight=0)}
