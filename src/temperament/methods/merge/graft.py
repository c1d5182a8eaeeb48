from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from temperament.delta import Sparse
from temperament.errors import UserError
from temperament.methods.merge._learned import add_grad, differences, keep_originals
from temperament.nn import linalg
from temperament.parts import part
from temperament.train.trained import Param, Trained


@part("merge.graft", papers=["061"])
@dataclass(frozen=True)
class Graft:
    """The few entries of a fine-tune that carry its skill, found by training the mask and no weight.

        W(m) = base + m * (tuned - base),   m = g0 + (1 - 2 g0) * sigmoid(S - bias)
        g0 = 1 for the `share` of entries with the largest |tuned - base|, pooled over all tensors
        dL/dS = dL/dW * (tuned - base) * (1 - 2 g0) * sigmoid'(S - bias)

    The sigmoid is saturated, so m begins as g0 and a step flips entries: the rate is huge (plain SGD, 1e5 to 1e7). What is
    left is the rounded mask, a sparse change. The `trainable` of a train step with `start: base`. Embeddings, norms and head
    are left out by default. Source: Panigrahi et al. 2023, Task-Specific Skill Localization (paper 061).
    """

    of: str  # the step that tuned
    share: float = 0.001  # of the entries that begin in the graft
    bias: float = 10.0  # how far the mask is from changing
    targets: list[str] = field(default_factory=lambda: ["all-linear"])  # what may be grafted

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"share lies in (0, 1], not {self.share}")

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.of,)

    def build(self, base: Any, ctx: Any) -> Trained:
        wanted = {n for p in base.places.match(list(self.targets)) for n in p.parameters.values()}
        whole = differences(base, [ctx.delta(self.of, "merge.graft.of")], "merge.graft")
        d = {n: v[0] for n, v in whole.items() if n in wanted}
        if not d:
            raise UserError("merge.graft.targets", list(self.targets), f"step {self.of!r} changed none of these places")
        g0 = largest_entries(d, self.share)
        S = {n: nn.Parameter(torch.zeros_like(v)) for n, v in d.items()}
        weights = keep_originals(base, d)

        def sigmoid(name: str) -> Tensor:
            return torch.sigmoid(S[name].detach() - self.bias)

        def mask(name: str) -> Tensor:
            return torch.where(g0[name], 1 - sigmoid(name), sigmoid(name))

        @torch.no_grad()
        def put(*_: Any) -> None:
            for name, w in weights.items():
                w.copy_(base.originals[name] + mask(name) * d[name])

        def collect(name: str):
            def take(w: Tensor) -> None:
                s = sigmoid(name)
                add_grad(S[name], w.grad * d[name] * torch.where(g0[name], -1.0, 1.0) * s * (1 - s))
                w.grad = None

            return take

        put()
        return Trained(
            params=[Param(f"{n}:mask", S[n], role="mask", base=d[n], decay=False) for n in d],
            through={n: collect(n) for n in d},
            after_step=put,
            load=put,
            changes=lambda: {n: Sparse.of(torch.where(mask(n) > 0.5, d[n], 0.0)) for n in d},
        )


def largest_entries(d: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """True for the share of all entries with the largest |d|."""
    k = max(1, int(share * sum(v.numel() for v in d.values()) + 0.5))
    found = linalg.largest_of_all({n: v.abs() for n, v in d.items()}, k)
    chosen = {n: torch.zeros(v.shape, dtype=torch.bool, device=v.device) for n, v in d.items()}
    for name, at in found.items():
        chosen[name].view(-1)[at] = True
    return chosen
