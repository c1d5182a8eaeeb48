from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from temperament.errors import UserError
from temperament.methods.objectives.policy.grpo import group_advantages
from temperament.nn.batch import Rollout
from temperament.nn.logprobs import kl, label, score
from temperament.parts import part
from temperament.protocols import Term, Terms


@part("objectives.policy.score", papers=["174"], modalities=("text",))
@dataclass(frozen=True)
class SCoRe:
    """REINFORCE over the turns of a conversation, each turn with its own credit and its own hold on the reference.

        A_i  = credit[turn] (R_i - mean of R over the group)              R: as the rollout gives it, progress bonus included
        loss = mean over rows i of  - A_i sum_t log pi(y_t)  +  beta[turn] sum_t KL( pi(. | y_<t) || ref(. | y_<t) )

    KL over the whole vocabulary, nats, summed over the answer. On policy: no ratio, no clipping. Self-correction takes two
    steps of a recipe, for rewarding both turns at once is won by a good first answer that the second repeats:

        1  credit [0, 1], beta [large, small]    the second answer learns to mend; the first has its KL alone: it stays
        2  credit [1, 1], beta [small, small]    both are rewarded, the second with a progress bonus (rollout.two_turn: alpha)

    With one turn it is plain REINFORCE with a KL. Source: Kumar et al. 2024, SCoRe (paper 174): beta 0.1 and 0.01, to the base.
    """

    batch: ClassVar = ("Rollout",)
    credit: list[float] = field(default_factory=lambda: [1.0, 1.0])  # what each turn's reward counts; [0, 1] in the first step
    beta: list[float] = field(default_factory=lambda: [0.01, 0.01])  # weight of each turn's KL; all 0: no reference is scored
    reference: str = "base"  # version the KL is taken to: base, start
    scale: bool = False  # divide advantages by the standard deviation of their group

    def __post_init__(self):
        if not self.credit or len(self.credit) != len(self.beta):
            raise ValueError(f"credit and beta have one number for each turn, not {len(self.credit)} and {len(self.beta)}")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.reference,) if any(self.beta) else ()

    def prepare(self, whole: Rollout, views) -> Rollout:
        turn = turns(whole)
        if int(turn.max()) >= len(self.credit):
            mend = f"the rollout has {int(turn.max()) + 1} turns; give credit and beta for each"
            raise UserError("objectives.policy.score.credit", self.credit, mend)
        # One group is of one turn, however the rollout numbers them.
        group = whole.group * len(self.credit) + turn
        advantages = group_advantages(whole.rewards, group, self.scale, 1e-4)
        whole.advantages = (advantages * torch.tensor(self.credit)[turn])[:, None]
        return whole

    def counts(self, whole: Rollout) -> dict[str, float]:
        turn, n = turns(whole), len(whole)
        held = {f"kl_{k + 1}": float((turn == k).sum()) for k in range(len(self.beta))} if any(self.beta) else {}
        return {"policy": n, "reward": n} | ({"kl": n} if held else {}) | held

    def loss(self, micro: Rollout, views) -> Terms:
        w, n, turn = micro.tokens.weights, len(micro), turns(micro)
        reducers = [label(), kl(views.view(self.reference), direction="reverse")] if any(self.beta) else [label()]
        got = score(views.model, micro.tokens, *reducers)
        terms = {"policy": Term(-micro.advantages * got["label"] * w, n), "reward": Term(micro.rewards, n, weight=0)}
        if any(self.beta):
            apart = (got["kl"] * w).sum(1)
            terms["kl"] = Term(torch.tensor(self.beta, device=apart.device)[turn] * apart, n)
            for k in range(len(self.beta)):
                here = (turn == k).float()
                terms[f"kl_{k + 1}"] = Term(apart.detach() * here, float(here.sum()), weight=0)
        return terms


def turns(rows: Rollout) -> Tensor:
    """(rows,): the turn of each row, from 0; all 0 where a rollout has one."""
    return torch.zeros_like(rows.group) if rows.turn is None else rows.turn
