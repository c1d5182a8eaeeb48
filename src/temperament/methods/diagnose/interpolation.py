from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from temperament.methods.diagnose._path import Path, loss_of, rows_of
from temperament.parts import part
from temperament.protocols import Source


@part("diagnose.interpolation", papers=["081"])
@dataclass(frozen=True)
class Interpolation:
    """Does the straight line from base to tuned hold, and which layers break it?

        whole      B = max_a [ L((1-a) base + a tuned) - ((1-a) L_base + a L_tuned) ]
        layer l    b_l = max_a [ L(layer l at a, others tuned) - ((1-a) L(layer l at 0) + a L_tuned) ]
        stragglers b_l > mean + `above` sd of all b

    Where a barrier shows, trimming the stragglers' change before interpolating mends it: `mend` is that merge, ready to use
    (its `scale` is WiSE-FT's a). Loss in nats a token on rows of `data`, or on texts the base writes itself. Source: In Search
    of the Successful Interpolation (paper 081).
    """

    points: int = 4  # between the ends
    above: float = 1.0  # standard deviations from which a layer counts as a straggler
    keep: float = 0.5  # share of a straggler's change that `mend` keeps, the largest
    data: Source | None = None  # rows the loss is of; none: texts the base writes
    rows: int = 32  # how many
    length: int = 48  # tokens of a written one

    def __post_init__(self):
        if self.points < 1 or not 0 < self.keep <= 1:
            raise ValueError("points is at least 1, keep in (0, 1]")

    @torch.no_grad()
    def diagnose(self, subject: Any) -> dict[str, Any]:
        path = Path(subject, "diagnose.interpolation")
        with path.at(0.0):
            batches = rows_of(path.base, self.data, self.rows, self.length, "diagnose.interpolation.data")
        return self.scan(path, loss_of(path.base.model, batches))

    @torch.no_grad()
    def scan(self, path: Path, loss: Callable[[], Any]) -> dict[str, Any]:
        at = [k / (self.points + 1) for k in range(self.points + 2)]

        def line(layer: str | None) -> list[float]:
            values = []
            for a in at:
                with path.at(a if layer is None else {layer: a}):
                    values.append(float(loss()))
            return values

        whole = line(None)
        layers = [{"layer": name, "barrier": barrier(at, line(name))} for name in path.layers]
        b = torch.tensor([r["barrier"] for r in layers], dtype=torch.float64)
        cut = float(b.mean() + self.above * b.std(unbiased=False))
        stragglers = [r["layer"] for r in layers if r["barrier"] > max(cut, 0.0)]
        rules = [{"filter": name + ".", "value": self.keep} for name in stragglers if name != "outside"]
        mend = {"merge.ties": {"density": [[*rules, {"value": 1.0}]]}} if rules else None
        return {"path": [{"at": a, "loss": v} for a, v in zip(at, whole, strict=True)], "barrier": barrier(at, whole),
                "layers": layers, "stragglers": stragglers, "mend": mend}  # fmt: skip


def barrier(at: list[float], values: list[float]) -> float:
    """The most a curve lies above the chord of its ends; 0 for a convex one."""
    return max(v - ((1 - a) * values[0] + a * values[-1]) for a, v in zip(at, values, strict=True))
