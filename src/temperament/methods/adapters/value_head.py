from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from temperament.errors import UserError
from temperament.nn import forward
from temperament.parts import part
from temperament.train.trained import Param, Trained


@part("adapters.value_head", papers=["213"], modalities=("text",))
@dataclass(frozen=True)
class ValueHead:
    """A number read from the last hidden state before each token: V(s_t) = w . h_(t-1) + b, the value of what is written so far.

    What a critic trains, alone (a linear reader of the policy it stands on) or with an adapter or selection of its own. w = b = 0 at the start, so
    the first advantages are the returns themselves. It changes nothing the model says and is no part of the delta.
    """

    name: str = "value"  # how objectives ask for it

    def build(self, base: Any, ctx: Any) -> Trained:
        below = forward.head_of(base.model)
        if below is None:
            raise UserError("adapters.value_head", base.id, "this base has no output head to stand beside; use a language model")
        width = forward.module_of(base.model).config.get_text_config().hidden_size
        head = nn.Linear(width, 1, device=below.weight.device, dtype=torch.float32)
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        params = [Param(f"head/{self.name}.{n}", p, n, decay=False) for n, p in head.named_parameters()]
        return Trained(params=params, heads={self.name: head})
