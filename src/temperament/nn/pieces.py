"""Linear adapters in one formula: a *piece* is what an adapter puts at one place.

    change()            the piece as an expression on the base weight; merge, unmerge, export, diagnosis, dial all read this
    forward(x, base)    the cheap way to the same thing; base(x) is what lies under the piece, base.weight its weight

`attach` leaves the model's own modules and parameter names untouched: it puts a callable in front of `module.forward`, and
takes it away again. Pieces live outside the model, so the base's state dict, its ties and its identity stay what they were, and
with the switch off the model *is* the base, bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from temperament.delta import Change


class Piece(nn.Module):
    """One place's share of a linear adapter. Subclasses give `change`; `forward` may be overridden with something cheaper."""

    def change(self) -> Change:
        """The change of the base weight, as the module stores it; differentiable in the piece's parameters."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: Under) -> Tensor:
        return base(x) + base.map(x, self.change().delta(base.weight))


class Around(nn.Module):
    """Something put around a module - a place, an MLP, an attention - that is no change of a weight.

    `forward(base, *args, **kwargs)` is called with the module's own arguments; `base(...)` is the module with what is attached
    below. It travels as an Addition, and the part that made it builds it again. strength: the addition's; 0 must be the base.
    """

    strength: float = 1.0

    def forward(self, base: Under, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Under:
    """What lies under a piece at a place: callable, with the base's own weight and bias at hand.

    bare: nothing else is attached below, so a fused kernel may use weight and bias directly.
    """

    module: nn.Module
    call: Callable[..., Any]
    bare: bool

    @property
    def weight(self) -> Tensor:
        """As the module stores it."""
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    @property
    def transposed(self) -> bool:
        """GPT-2's Conv1D stores (in, out)."""
        return type(self.module).__name__ == "Conv1D"

    def map(self, x: Tensor, weight: Tensor) -> Tensor:
        """The module's own kind of map with another weight (stored as the module stores its own) and no bias."""
        m = self.module
        if isinstance(m, nn.Embedding):
            return F.embedding(x, weight)
        if isinstance(m, nn.modules.conv._ConvNd):
            return m._conv_forward(x, weight, None)
        return F.linear(x, weight.T if self.transposed else weight)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


@dataclass
class Switch:
    """Whether the pieces that share it take part in a forward pass."""

    on: bool = True


_numbers = itertools.count()  # of all that is ever attached


def arounds(model: nn.Module) -> tuple[int, ...]:
    """What now lies around the modules of a model and takes part: a measurement of the model holds for one such state."""
    links = (link for m in model.modules() for link in m.__dict__.get("_pieces", ()))
    return tuple(piece.__dict__["_number"] for piece, switch in links if switch.on and isinstance(piece, Around))


def attach(module: nn.Module, piece: Piece | Around, switch: Switch) -> Callable[[], None]:
    """Put `piece` over `module`, above whatever is attached already. Returns the function that takes it away."""
    chain = module.__dict__.setdefault("_pieces", [])
    if not chain:
        module.__dict__["forward"] = partial(_through, module, type(module).forward.__get__(module), chain)
    piece.__dict__["_number"] = next(_numbers)
    link = (piece, switch)
    chain.append(link)

    def detach() -> None:
        chain.remove(link)
        if not chain:
            module.__dict__.pop("forward", None)
            module.__dict__.pop("_pieces", None)

    return detach


def _through(module: nn.Module, inner: Callable, chain: list, *args: Any, **kwargs: Any) -> Any:
    links = [piece for piece, switch in chain if switch.on]

    def call(k: int, args: tuple, kwargs: dict) -> Any:
        if k < 0:
            return inner(*args, **kwargs)
        under = Under(module, lambda *a, **kw: call(k - 1, a, kw), bare=k == 0)
        return links[k](args[0], under) if isinstance(links[k], Piece) else links[k](under, *args, **kwargs)

    return call(len(links) - 1, args, kwargs)
