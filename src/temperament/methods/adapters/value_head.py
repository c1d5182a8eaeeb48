from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from temperament.nn import draws, forward
from temperament.nn.heads import width
from temperament.parts import part
from temperament.train.trained import Param, Trained


@part("adapters.value_head", papers=["213", "269"], modalities=("text", "control"))
@dataclass(frozen=True)
class ValueHead:
    """A number read from the last hidden state before each token: V(s_t) = w . h_(t-1) + b, the value of what is written so
    far.

    What a critic trains, alone (a linear reader of the policy it stands on) or with an adapter or selection of its own. With
    `hidden` units it is a perceptron, V = w . tanh(W2 tanh(W1 h + b1) + b2) + b: what a critic of a control policy wants,
    whose h is what is seen and planned. w = b = 0 at the start, so the first advantages are the returns themselves. It
    changes nothing the model says and is no part of the delta."""

    name: str = "value"  # how objectives ask for it
    hidden: int = 0  # units of each of two hidden layers; 0: none

    def __post_init__(self):
        if self.hidden < 0:
            raise ValueError("hidden must not be negative")

    def build(self, base: Any, ctx: Any) -> Trained:
        inside, device = width(base.model), forward.device_of(base.model)
        last = nn.Linear(self.hidden or inside, 1)
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        head: nn.Module = last
        if self.hidden:
            head = nn.Sequential(
                nn.Linear(inside, self.hidden), nn.Tanh(), nn.Linear(self.hidden, self.hidden), nn.Tanh(), last
            )
            for i in (0, 2):
                nn.init.orthogonal_(head[i].weight, 2**0.5, generator=draws.generator(ctx.seed, f"value_head/{self.name}/{i}"))
                nn.init.zeros_(head[i].bias)
        head.to(device)
        params = [Param(f"head/{self.name}.{n}", p, n, decay=False) for n, p in head.named_parameters()]
        return Trained(params=params, heads={self.name: head})
