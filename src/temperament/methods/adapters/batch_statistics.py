from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from temperament.delta import Addition
from temperament.errors import UserError
from temperament.nn.pieces import Around, Under
from temperament.parts import part, plain
from temperament.train.trained import Trained


class BatchNorm(Around):
    """y = (x - m) / sqrt(v + eps) * w + b;  m, v: kept * the base's own + (1 - kept) * this batch's, channel by channel."""

    starts_at_zero = False  # from the first forward on it normalises otherwise than the base

    def __init__(self, kept: float):
        super().__init__()
        self.kept = kept

    def forward(self, base: Under, x: Tensor) -> Tensor:
        kept, norm = 1 - self.strength * (1 - self.kept), base.module
        if kept == 1:
            return base(x)
        each = [0, *range(2, x.dim())]
        var, mean = x.var(each, correction=0), x.mean(each)
        mean, var = kept * norm.running_mean + (1 - kept) * mean, kept * norm.running_var + (1 - kept) * var
        column = lambda t: t.view(1, -1, *(1 for _ in each[1:]))
        y = (x - column(mean)) * column((var + norm.eps).rsqrt())
        return y if norm.weight is None else y * column(norm.weight) + column(norm.bias)


@part("adapters.batch_statistics", papers=["200"], modalities=("image",), declares=["couples the batch"])
@dataclass(frozen=True)
class BatchStatistics:
    """BatchNorm normalises by the statistics of the batch that is before it, not by those of the base's training.

        y = (x - m) / sqrt(v + eps) * w + b;      m = kept m_base + (1 - kept) mean(x),  v alike, over rows and places

    What adapting to a new domain begins with: a shift of its first two moments is gone at once. It trains nothing itself: put
    it beside a selection. Rows of a batch then depend on each other, by design, so a step must be one forward. It serves
    training (and what a source asks of the model meanwhile); the change that is left is measured, exported and dialled with
    the base's own statistics. kept 1 is the base. Source: Schneider et al. 2020; RMT (paper 200) with kept 0.
    """

    kept: float = 0.0  # share of the base's own statistics

    def __post_init__(self):
        if not 0 <= self.kept <= 1:
            raise ValueError(f"kept must lie in 0..1, not {self.kept}")

    def build(self, base: Any, ctx: Any) -> Trained:
        found = {
            f"{component}/{path}:statistics": module
            for component, whole in base.components.items()
            for path, module in whole.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
        }
        if not found:
            mend = "it has no BatchNorm whose statistics could be replaced; leave this part out"
            raise UserError("adapters.batch_statistics", base.id, mend)
        told = plain(self)[type(self).part_name]
        return Trained(
            around={name: (module, BatchNorm(self.kept)) for name, module in found.items()},
            additions=lambda: {name: Addition(type(self).part_name, told, {}, ship=False) for name in found},
        )

    def rebuild(self, base: Any, name: str, addition: Addition) -> tuple[nn.Module, Around]:
        component, _, path = name.partition("/")
        return base.components[component].get_submodule(path.partition(":")[0]), BatchNorm(self.kept)
