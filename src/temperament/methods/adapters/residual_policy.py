from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from temperament.delta import Addition
from temperament.errors import UserError
from temperament.nn import draws
from temperament.nn.pieces import Around, Under
from temperament.nn.policy import Says
from temperament.parts import part, plain
from temperament.train.live import Param, Trained


class Residual(Around):
    """mean = W3 silu(W2 silu(W1 [o, a] + b1) + b2);   o what is seen, a the action planned for this step."""

    starts_at_zero = False  # what it starts as is a decision, if of nothing: a reference must keep it

    def __init__(self, inside: int, actions: int, width: int, scale: float, log_std: float):
        super().__init__()
        self.scale = scale
        self.one, self.two = nn.Linear(inside, width), nn.Linear(width, width)
        self.out = nn.Linear(width, actions, bias=False)
        self.log_std = nn.Parameter(torch.full((actions,), log_std))

    def forward(self, base: Under, observations: Tensor, planned: Tensor | None = None) -> Says:
        if planned is None:
            return base(observations)
        about = base(observations, planned).action()  # what lies below may correct the plan too
        x = torch.cat([observations, about], -1)
        x = nn.functional.silu(self.two(nn.functional.silu(self.one(x))))
        return Says(self.out(x), self.log_std, about, self.scale * self.strength)


@part("adapters.residual_policy", papers=["269"], modalities=("control",))
@dataclass(frozen=True)
class ResidualPolicy:
    """A small Gaussian policy on top of a frozen one: at every step it corrects the action that was planned for it.

        u ~ N(mu(o, a_plan), exp(log_std)^2);      a = a_plan + scale * u             acting on the mean: u = mu

    o (observations,): what is seen now; a_plan: this step's action of the chunk planned some steps ago; actions are
    normalised to -1..1. mu is a perceptron of two hidden layers whose last matrix begins at `gain` (0: the start acts as the
    base, exactly), log_std a number for each action, learned, the same in every state. The log-prob is of u, so it does not
    depend on scale; no gradient goes through the base, whose chunks and kind do not matter. Trained by `rollout.episodes`
    with `explore: step`; it never merges, travels as an addition, and its strength multiplies scale: the dial at 0 is the
    base. Source: Ankile et al. 2024 (paper 269: scale 0.1, two layers of 512, gain 0.01)."""

    scale: float = 0.1  # of a correction, in normalised actions
    width: int = 64  # hidden units of each layer
    log_std: float = -1.0  # log of the spread of u at the start: how far it explores
    gain: float = 0.0  # of the last matrix at the start

    def __post_init__(self):
        if self.scale <= 0 or self.width < 1 or self.gain < 0:
            raise ValueError("scale is above 0, width at least 1, gain not negative")

    def build(self, base: Any, ctx: Any) -> Trained:
        component, policy = next(iter(base.components.items()))
        config = getattr(policy, "config", None)
        if not hasattr(config, "actions"):
            raise UserError(
                "adapters.residual_policy",
                base.id,
                "it corrects the actions of a policy; use a policy as base, e.g. lab/policy",
            )
        name, piece = f"{component}/residual", self._piece(config.features, config.actions)
        for key, gain in (("one", 2**0.5), ("two", 2**0.5), ("out", self.gain)):
            layer = getattr(piece, key)
            nn.init.orthogonal_(layer.weight, gain, generator=draws.generator(ctx.seed, f"{name}/{key}"))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        piece.to(next(policy.parameters()).device)
        options = plain(self)[type(self).part_name]
        return Trained(
            params=[Param(f"{name}:{n}", p, n, decay=False) for n, p in piece.named_parameters()],
            around={name: (policy, piece)},
            additions=lambda: {
                name: Addition(type(self).part_name, options, {n: p.detach().clone() for n, p in piece.named_parameters()})
            },
        )

    def _piece(self, inside: int, actions: int) -> Residual:
        return Residual(inside, actions, self.width, self.scale, self.log_std)

    def rebuild(self, base: Any, name: str, addition: Addition) -> tuple[nn.Module, Around]:
        policy = base.components[name.partition("/")[0]]
        piece = self._piece(policy.config.features, policy.config.actions)
        piece.load_state_dict({n: t for n, t in addition.tensors.items()})
        return policy, piece
