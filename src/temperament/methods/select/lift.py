from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from temperament.errors import UserError
from temperament.nn import draws, linalg
from temperament.parts import part
from temperament.train.packed import values_at
from temperament.train.trained import Param, Trained


@part("select.lift", papers=["216"])
@dataclass(frozen=True)
class Lift:
    """LIFT: train the principal weights, the entries largest after a rank reduction; the choice moves as the weights do.

        W_r = U_r S_r V_r^T     mask = the k largest entries of |W_r| of each matrix (m, n)     k = min((m + n) R, m n)

    Every `refresh` steps the mask is taken anew from the present W; moments of entries that stay go with them, a new entry's
    are zero, and the step count of the bias correction runs on. Gradients are gathered and optimizer states kept for k entries
    alone; any optimizer will do. Biases, norms and embeddings are frozen. `by` gives the paper's controls under the same
    budget: the largest weights, random ones, or the largest of what the rank reduction leaves out.
    Source: Liu et al. 2025, LIFT the Veil for the Truth (paper 216). Its AdamW: betas (0.9, 0.95), eps 1e-6.
    """

    rate_factor: ClassVar = 3.0  # usual rate over full fine-tuning's

    rank: int = 128  # singular directions kept when weights are ranked
    budget: int = 128  # entries of a matrix: as many as a LoRA of this rank has
    share: float | None = None  # or this share of every matrix
    refresh: int = 200  # steps between two choices; 0: chosen once
    by: Literal["principal", "magnitude", "random", "residual"] = "principal"  # what ranks the entries
    targets: list[str] = field(default_factory=lambda: ["all-linear"])  # places that are trained: roles, names, a regex

    def __post_init__(self):
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"share lies in (0, 1], not {self.share}")
        if min(self.rank, self.budget) < 1 or self.refresh < 0:
            raise ValueError("rank and budget must be at least 1, refresh at least 0")

    def build(self, base: Any, ctx: Any) -> Trained:
        params: list[Param] = []
        for place in base.places.match(self.targets, "select.lift.targets"):
            name, weight = place.parameters.get("weight"), place.weight
            if name is None or weight.dim() != 2 or any(p.dense is weight for p in params):
                continue
            entries = self.choose(weight, name, ctx.seed, (ctx.round, 0))
            depth, values = base.places.depth_of(name), values_at(weight, entries)
            params.append(Param(name, values, depth=depth, base=weight, dense=weight, entries=entries))
        if not params:
            raise UserError("select.lift.targets", self.targets, "no matrix is among these places; name linear maps")

        def reselect(progress: Any) -> dict[str, Tensor]:
            done = progress.step + 1
            if not self.refresh or done % self.refresh or done >= progress.total:
                return {}
            return {p.name: self.choose(p.dense, p.name, ctx.seed, (ctx.round, done)) for p in params}

        return Trained(params=params, reselect=reselect)

    @torch.no_grad()
    def choose(self, weight: Tensor, name: str, seed: int, when: tuple[int, int] = (0, 0)) -> Tensor:
        """Flat positions (k,) of the entries of a matrix that are trained from now on."""
        m, n = weight.shape
        k = min((m + n) * self.budget, m * n) if self.share is None else max(int(self.share * m * n + 0.5), 1)
        address = f"lift/{name}/{when[0]}/{when[1]}"
        if self.by == "random":
            return draws.permutation(m * n, seed, address)[:k].sort().values.to(weight.device)
        W = weight.detach()
        if self.by == "magnitude":
            return linalg.largest(W.abs(), k)
        U, S, V = linalg.singular(W, self.rank, seed, address)
        low = (U * S) @ V.T
        return linalg.largest((low if self.by == "principal" else W.to(low) - low).abs(), k)
