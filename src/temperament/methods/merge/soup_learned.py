from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from temperament.delta import Dense
from temperament.delta.depth import block_of
from temperament.methods.merge._learned import add_grad, differences, keep_originals
from temperament.parts import part
from temperament.train.trained import Param, Trained


@part("merge.soup_learned", papers=["120"])
@dataclass(frozen=True)
class LearnedSoup:
    """The mixing weights of a soup found by gradient on held-out data: W = base + sum_i a_i (W_i - base), a = softmax(s).

        dL/ds_j = a_j (g_j - sum_i a_i g_i),    g_i = sum over tensors of <dL/dW, W_i - base>

    The `trainable` of a train step on held-out rows, with `start: base`; one softmax for the model or one a layer. Starts as
    the uniform soup. Source: Wortsman et al. 2022, Model soups (paper 120).
    """

    of: list[str] = field(default_factory=list)  # names of the steps whose models are mixed
    by: Literal["model", "layer"] = "model"  # one set of weights, or one a layer

    def __post_init__(self):
        if len(self.of) < 2:
            raise ValueError("name at least two steps in `of`")

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(self.of)

    def build(self, base: Any, ctx: Any) -> Trained:
        d = differences(base, [ctx.delta(n, "merge.soup_learned.of") for n in self.of], "merge.soup_learned")
        groups = {name: (block_of(name) or "outside") if self.by == "layer" else "all" for name in d}
        keys = sorted(set(groups.values()), key=str)
        row = {name: keys.index(groups[name]) for name in d}
        s = nn.Parameter(torch.zeros(len(keys), len(self.of)))
        weights = keep_originals(base, d)

        def blended(name: str) -> Tensor:
            return torch.tensordot(s.detach().softmax(1)[row[name]].to(d[name]), d[name], dims=1)

        @torch.no_grad()
        def put(*_: Any) -> None:
            for name, w in weights.items():
                w.copy_(base.originals[name] + blended(name))

        def collect(name: str):
            def take(w: Tensor) -> None:
                a = s.detach()[row[name]].softmax(0)
                g = torch.stack([(w.grad * change).sum() for change in d[name]]).to(a)
                grad = torch.zeros_like(s)
                grad[row[name]] = a * (g - (a * g).sum())
                add_grad(s, grad)
                w.grad = None

            return take

        put()
        component = next(iter(base.components))
        return Trained(
            params=[Param(f"{component}/soup:weights", s, role="coefficient", decay=False)],
            through={name: collect(name) for name in d},
            after_step=put,
            load=put,
            changes=lambda: {name: Dense(blended(name)) for name in d},
        )
