from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from temperament.methods.diagnose._path import Path, loss_of, rows_of
from temperament.nn import draws
from temperament.parts import part
from temperament.protocols import Source


@part("diagnose.sharpness", papers=["081"])
@dataclass(frozen=True)
class Sharpness:
    """Adaptive sharpness along the way from the base to the tuned model, of the whole and of each layer.

        worst    max over |d / |w||_p <= rho of  L(w + d) - L(w)          by normalised (2) or signed (inf) gradient ascent
        average  mean over z ~ N(0, 1) of        L(w + rho |w| z) - L(w)
        at       w = (1 - a) base + a tuned  for each a of `at`;  by layer: only the weights of one block move

    Elementwise adaptive: a rescaling of units that leaves the function leaves the sharpness. Nats a token, on rows of `data` or
    on texts the base writes itself. Total sharpness says little about what interpolates well; that of the layers that break
    the way (diagnose.interpolation) says more. Source: In Search of the Successful Interpolation (paper 081).
    """

    rho: float = 0.01  # radius, relative to each weight
    case: Literal["worst", "average"] = "worst"  # what is taken over the ball
    norm: Literal["2", "inf"] = "inf"  # of the ball, for the worst case
    steps: int = 5  # of ascent, or draws of the average
    at: list[float] = field(default_factory=lambda: [0.0, 0.5, 1.0])  # points between base (0) and tuned (1)
    layers: bool = True  # each layer by itself, at the tuned end
    data: Source | None = None  # rows the loss is of; none: texts the base writes
    rows: int = 32  # how many
    length: int = 48  # tokens of a written one

    def __post_init__(self):
        if self.rho <= 0 or self.steps < 1:
            raise ValueError("rho is above 0, steps at least 1")
        if any(not 0 <= a <= 1 for a in self.at):
            raise ValueError("at: points lie in [0, 1]")

    def diagnose(self, subject: Any) -> dict[str, Any]:
        path = Path(subject, "diagnose.sharpness")
        with path.at(0.0):
            batches = rows_of(path.base, self.data, self.rows, self.length, "diagnose.sharpness.data")
        loss, found, layers = loss_of(path.base.model, batches), [], []
        for a in self.at:
            with path.at(a) as known:
                found.append({"at": a, "loss": _value(loss), "sharpness": self.of(loss, known)})
        if self.layers:
            with path.at(1.0) as known:
                for name, own in path.layers.items():
                    layers.append({"layer": name, "sharpness": self.of(loss, {n: known[n] for n in own})})
        return {"path": found, "layers": layers, "rho": self.rho, "case": self.case}

    def of(self, loss: Callable[[], Tensor], tensors: Mapping[str, Tensor]) -> float:
        """Of a loss of these leaf tensors, at their values, which are left as they were."""
        if self.case == "average":
            return average(loss, tensors, self.rho, self.steps)
        return worst(loss, tensors, self.rho, float(self.norm), self.steps)


def _value(loss: Callable[[], Tensor]) -> float:
    with torch.no_grad():
        return float(loss())


def worst(loss: Callable[[], Tensor], tensors: Mapping[str, Tensor], rho: float, p: float, steps: int) -> float:
    start = {n: t.detach().clone() for n, t in tensors.items()}
    e = {n: torch.zeros_like(t) for n, t in start.items()}
    asked = {n: t.requires_grad for n, t in tensors.items()}
    first = best = _value(loss)
    try:
        for t in tensors.values():
            t.requires_grad_(True)
        for k in range(steps):
            grads = torch.autograd.grad(loss(), list(tensors.values()), allow_unused=True)
            g = {n: (torch.zeros_like(t) if d is None else d) * t.abs() for (n, t), d in zip(start.items(), grads, strict=True)}
            if p == 2:
                size = torch.stack([v.square().sum() for v in g.values()]).sum().sqrt().clamp(min=1e-30)
                e = {n: e[n] + rho * g[n] / size for n in e}  # a step of the radius, then back onto the ball
                far = torch.stack([v.square().sum() for v in e.values()]).sum().sqrt()
                e = {n: v * (rho / far) if far > rho else v for n, v in e.items()}
            else:
                e = {n: (e[n] + rho * g[n].sign() / (1 if k == 0 else 2)).clamp(-rho, rho) for n in e}
            _put(tensors, start, e)
            best = max(best, _value(loss))
    finally:
        _put(tensors, start, None)
        for n, t in tensors.items():
            t.requires_grad_(asked[n])
    return best - first


def average(loss: Callable[[], Tensor], tensors: Mapping[str, Tensor], rho: float, times: int) -> float:
    start, first, total = {n: t.detach().clone() for n, t in tensors.items()}, _value(loss), 0.0
    try:
        for k in range(times):
            e = {
                n: rho * draws.normal(0, "sharpness/" + n, k, torch.arange(t.numel())).view(t.shape).to(t)
                for n, t in start.items()
            }
            for sign in (1, -1):  # in pairs: what is linear in z cancels
                _put(tensors, start, {n: sign * v for n, v in e.items()})
                total += _value(loss) - first
    finally:
        _put(tensors, start, None)
    return total / (2 * times)


@torch.no_grad()
def _put(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], e: Mapping[str, Tensor] | None) -> None:
    for n, t in tensors.items():
        t.copy_(start[n] if e is None else start[n] + start[n].abs() * e[n])
