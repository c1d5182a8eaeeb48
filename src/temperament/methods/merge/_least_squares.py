"""Each linear map of a merged model fitted to what the maps of both models put out, from what both had as their input.

    min over W, b  of  sum over samples |W x + b - y|^2 + lambda |(W, b) - (W, b)_0|^2,      lambda = ridge * mean of x^2
    x, y: inputs and outputs of the models on their own activations, merged units averaged; W between s1 and s2 stays 0

All maps at once from one pass, each in closed form; W_0 is the plain average, so the error on these samples never grows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from temperament.methods.merge._wide import Entries, Layout

Record = dict[tuple[str, str], Tensor]


def maps_of(model: nn.Module) -> dict[str, nn.Module]:
    """Linear maps and convolutions whose weight is theirs alone."""
    owners: dict[int, int] = {}
    for m in model.modules():
        for p in m.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    kinds = lambda m: isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" or (isinstance(m, nn.Conv2d) and m.groups == 1)
    zeros = lambda m: getattr(m, "padding_mode", "zeros") == "zeros" and not isinstance(getattr(m, "padding", 0), str)
    return {n: m for n, m in model.named_modules() if kinds(m) and zeros(m) and owners[id(m.weight)] == 1}


@torch.no_grad()
def recorded(model: nn.Module, batch: Any, wanted: Iterable[tuple[str, str]]) -> Record:
    """{(module, "input" or "output"): value} of one forward; padding is left out of (rows, positions, width) values."""
    out: dict[tuple[str, str], list[Tensor]] = {}
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None

    def keep(key: tuple[str, str]) -> Callable:
        def hook(module: nn.Module, args: tuple, result: Any) -> None:
            value = args[0] if key[1] == "input" else result
            value = (value[0] if isinstance(value, tuple) else value).detach()
            if mask is not None and value.dim() == 3 and value.shape[:2] == mask.shape:
                value = value[mask.bool()]
            out.setdefault(key, []).append(value)

        return hook

    handles = [model.get_submodule(key[0]).register_forward_hook(keep(key)) for key in dict.fromkeys(wanted)]
    try:
        model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {key: values[0] if len(values) == 1 else torch.cat(values) for key, values in out.items()}


def rows(value: Tensor, axis: int = -1) -> Tensor:
    """(samples, channels)."""
    return value.movedim(axis, -1).reshape(-1, value.shape[axis])


@dataclass
class Fit:
    """Normal equations of one map, of all samples so far."""

    module: nn.Module
    into: Entries
    out: Entries
    gram: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    spread: int = field(default=1)  # entries of one channel in a row of the weight

    def add(self, x: Tensor, y: Tensor) -> None:
        """x, y: input and output of the result's units; rows, or images (rows, channels, height, width)."""
        m = self.module
        if isinstance(m, nn.Conv2d):
            self.spread = m.weight[0, 0].numel()
            x = nn.functional.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride).transpose(1, 2).flatten(0, 1)
            y = rows(y, 1)
        else:
            x, y = rows(x), rows(y)
        if m.bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        x, y = x.double(), y.double()
        self.gram, self.cross = self.gram + x.T @ x, self.cross + y.T @ x
        self.squares = self.squares + y.square().sum(0)

    def whole(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(out, in [+ 1]) of a weight as it is stored."""
        w = weight.T if type(self.module).__name__ == "Conv1D" else weight.flatten(1)
        return (w if bias is None else torch.cat([w, bias[:, None]], 1)).double()

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """The sum of squares on the samples."""
        w = self.whole(weight, bias)
        return float(((w @ self.gram) * w).sum() - 2 * (w * self.cross).sum() + self.squares.sum())

    def solve(self, weight: Tensor, bias: Tensor | None, ridge: float) -> tuple[Tensor, Tensor | None]:
        start = self.whole(weight, bias)
        kind = self.into.kind.repeat_interleave(self.spread)
        kind = kind if bias is None else torch.cat([kind, kind.new_zeros(1)])
        found, weight_of_start = start.clone(), ridge * float(self.gram.diagonal().mean())
        for own in self.out.kind.unique().tolist():
            mine = (self.out.kind == own).nonzero()[:, 0]
            read = ((kind == 0) | (kind == own) | (own == 0)).nonzero()[:, 0]
            A = self.gram[read][:, read] + weight_of_start * torch.eye(len(read), dtype=torch.float64)
            old = start[mine][:, read]
            left = (self.cross[mine][:, read] - old @ self.gram[read][:, read]).T
            step = torch.linalg.solve(A, left) if ridge else torch.linalg.lstsq(A, left, driver="gelsd").solution
            found[mine[:, None], read] = old + step.T
        w = found if bias is None else found[:, :-1]
        w = w.T if type(self.module).__name__ == "Conv1D" else w.reshape(weight.shape)
        return w.to(weight), None if bias is None else found[:, -1].to(bias)


def fits_of(maps: Mapping[str, nn.Module], where: Layout) -> dict[str, Fit]:
    out = {}
    for name, m in maps.items():
        columns = 0 if type(m).__name__ == "Conv1D" else 1
        get = lambda axis, side, name=name, m=m: where.get((f"{name}.weight", axis)) or Entries.same(m.weight.shape[axis], side)
        out[name] = Fit(m, get(columns, "in"), get(1 - columns, "out"))
    return out
