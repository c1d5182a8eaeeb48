from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from temperament.delta import Dense
from temperament.delta.depth import block_of
from temperament.methods.merge._learned import add_grad, differences, keep_originals, modules
from temperament.parts import part
from temperament.train.trained import Param, Trained


@part("merge.soup_learned", papers=["120"])
@dataclass(frozen=True)
class LearnedSoup:
    """The mixing weights of a soup found by gradient on held-out data: W = base + sum_i a_i (W_i - base), a = softmax(s).

        dL/ds_j = a_j (g_j - sum_i a_i g_i),    g_i = sum over tensors of <dL/dW, W_i - base>

    The `trainable` of a train step on held-out rows, with `start: base`; one softmax for the model or one a layer. Starts as
    the uniform soup. Modules that all bring (a head for the same classes) are mixed as the weights are, those outside of
    blocks with what lies outside. Source: Wortsman et al. 2022, Model soups (paper 120).
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
        deltas = [ctx.delta(n, "merge.soup_learned.of") for n in self.of]
        d = differences(base, deltas, "merge.soup_learned")
        around, added = modules(base, deltas)
        both = d | {name: rows for name, (_, rows) in added.items()}
        groups = {name: (block_of(name) or "outside") if self.by == "layer" else "all" for name in both}
        keys = sorted(set(groups.values()), key=str)
        row = {name: keys.index(groups[name]) for name in both}
        s = nn.Parameter(torch.zeros(len(keys), len(self.of)))
        weights = keep_originals(base, d)

        def blended(name: str) -> Tensor:
            return torch.tensordot(s.detach().softmax(1)[row[name]].to(both[name]), both[name], dims=1)

        @torch.no_grad()
        def put(*_: Any) -> None:
            for name, w in weights.items():
                w.copy_(base.originals[name] + blended(name))
            for name, (p, _) in added.items():
                p.copy_(blended(name))

        def collect(name: str):
            def take(w: Tensor) -> None:
                a = s.detach()[row[name]].softmax(0)
                g = torch.stack([(w.grad * change).sum() for change in both[name]]).to(a)
                grad = torch.zeros_like(s)
                grad[row[name]] = a * (g - (a * g).sum())
                add_grad(s, grad)
                w.grad = None

            return take

        put()
        for name, (p, _) in added.items():
            p.requires_grad_(True).register_post_accumulate_grad_hook(collect(name))
        first = deltas[0].baked().additions
        tensors = lambda of: {n.rpartition("::")[2]: blended(n) for n in added if n.startswith(f"{of}::")}
        component = next(iter(base.components))
        return Trained(
            params=[Param(f"{component}/soup:weights", s, role="coefficient", decay=False)],
            through={name: collect(name) for name in d},
            after_step=put,
            load=put,
            changes=lambda: {name: Dense(blended(name)) for name in d},
            around=around,
            additions=lambda: {name: replace(first[name], tensors=tensors(name)) for name in around},
        )
