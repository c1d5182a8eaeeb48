from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from temperament.errors import UserError
from temperament.nn import draws
from temperament.nn.batch import Rollout
from temperament.parts import number, part
from temperament.protocols import Term, Terms


@part("objectives.policy.ppo", papers=["213", "010"], modalities=("text", "control", "image"))
@dataclass(frozen=True)
class PPO:
    """Proximal policy optimisation over tokens or decisions, with a critic as another player of the step.

        r_t = R [t is the last token] (or the reward of step t) - beta (log pi_old(y_t) - log pi_ref(y_t))
        delta_t = r_t + gamma V(s_t+1) - V(s_t);    A_t = delta_t + gamma lambda A_t+1;    returns_t = A_t + V(s_t)
        loss = - sum_t min(rho_t A_t, clip(rho_t, 1 - e, 1 + e) A_t) / count    rho_t = pi(y_t) / pi_old(y_t); count: tokens

    V is the head `value` of the player `critic`, asked before either is trained; `returns` are left in the batch for its
    objective (objectives.policy.value). critic: null takes V = 0, REINFORCE with reward to go. Each rollout is taken in
    `epochs` passes over `minibatches` parts. Advantages are centred and scaled over the tokens of the batch when `whiten`.
    Source: Schulman et al. 2017; the token reward is that of ReFT (paper 213): lambda 1, gamma 0.95, beta 0.01 to 0.05, 2
    epochs."""

    batch: ClassVar = ("Rollout",)
    clip: float = 0.2  # e: how far a ratio counts
    gamma: float = 0.95  # discount of a later reward
    lam: float = 1.0  # lambda: 1 trusts what happened, 0 the critic
    beta: float = 0.05  # price of leaving the reference, nats per token; 0 scores no reference
    reference: str = "start"  # version that is meant
    critic: str | None = "critic"  # the player whose value head is asked
    epochs: int = 2  # passes over a rollout
    minibatches: int = 1  # parts a pass is taken in
    whiten: bool = False  # centre and scale the advantages

    def __post_init__(self):
        if min(self.epochs, self.minibatches) < 1:
            raise ValueError("epochs and minibatches must be at least 1")
        if any(not 0 <= number(v, 1.0) <= 1 for v in (self.gamma, self.lam)):
            raise ValueError("gamma and lam must lie in 0..1")
        if number(self.clip, 1.0) <= 0:
            raise ValueError("clip must be above 0")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.reference,) if self.beta else ()

    def prepare(self, whole: Rollout, views) -> Rollout:
        w = (whole.tokens.weights != 0).float()
        whole.values = torch.zeros_like(w)
        if self.critic is not None:
            if not hasattr(whole.tokens, "states"):
                mend = "steps of denoising have no states that it could read; use critic: null"
                raise UserError("objectives.policy.ppo.critic", self.critic, mend)
            head = views.head(f"{self.critic}:value")
            read = lambda m, r: head(r.tokens.states(m).float())[..., 0] * (r.tokens.weights != 0)
            whole.values = views.precompute(f"{self.critic}:live", whole, read)
        price = torch.zeros_like(w)
        if self.beta:
            whole.reference = views.precompute(self.reference, whole, lambda m, r: r.tokens.logp(m))
            price = self.beta * (whole.behaviour - whole.reference) * w
        whole.advantages = generalised_advantages(at_the_end(whole.rewards, w) - price, whole.values, w, self.gamma, self.lam)
        whole.returns = (whole.advantages + whole.values) * w
        if self.whiten:
            mean = (whole.advantages * w).sum() / w.sum()
            spread = ((whole.advantages - mean).square() * w).sum().div(w.sum()).sqrt()
            whole.advantages = (whole.advantages - mean) / (spread + 1e-8) * w
        return whole

    def updates(self, whole: Rollout, views) -> list[Rollout]:
        return passes(whole, self.epochs, self.minibatches, views)

    def counts(self, whole: Rollout) -> dict[str, float]:
        n = whole.tokens.trained
        return {"policy": n, "clipped": n, "reward": len(whole)} | ({"kl": n} if self.beta else {})

    def loss(self, micro: Rollout, views) -> Terms:
        w, n = micro.tokens.weights, micro.tokens.trained
        logp = micro.tokens.logp(views.model)
        ratio = torch.exp(logp - micro.behaviour)
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        gain = torch.minimum(ratio * micro.advantages, clipped * micro.advantages)
        terms = {
            "policy": Term(-gain * w, n),
            "clipped": Term((ratio.detach() != clipped.detach()).float() * w, n, weight=0),
            "reward": Term(micro.rewards, len(micro), weight=0),
        }
        return terms | ({"kl": Term((micro.behaviour - micro.reference) * w, n, weight=0)} if self.beta else {})


def at_the_end(rewards: Tensor, w: Tensor) -> Tensor:
    """(rows, T): the reward of a row at its last sampled token, else 0; rewards that came step by step as they are."""
    if rewards.dim() == 2:
        return rewards * (w != 0)
    last = w * (w.flip(1).cumsum(1).flip(1) == 1)
    return rewards[:, None] * last


def generalised_advantages(rewards: Tensor, values: Tensor, w: Tensor, gamma: float, lam: float) -> Tensor:
    """(rows, T): advantages at the tokens with w = 1, as if those alone followed each other; 0 elsewhere. After the last, V =
    0."""
    out = torch.zeros_like(rewards)
    following, ahead = torch.zeros(2, len(rewards))  # V and A of the next sampled token
    for t in range(rewards.shape[1] - 1, -1, -1):
        here = w[:, t] != 0
        now = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * ahead
        out[:, t] = torch.where(here, now, 0.0)
        following, ahead = torch.where(here, values[:, t], following), torch.where(here, now, ahead)
    return out


def passes(whole: Rollout, epochs: int, minibatches: int, views) -> list[Rollout]:
    """The rollout, `epochs` times, each in `minibatches` parts of rows drawn anew; addressed by the step."""
    if minibatches == 1:
        return [whole] * epochs
    n, size = len(whole), -(-len(whole) // minibatches)
    orders = [draws.permutation(n, views.seed, f"ppo/{views.progress.step}", e).tolist() for e in range(epochs)]
    return [whole.select(order[i : i + size]) for order in orders for i in range(0, n, size)]
