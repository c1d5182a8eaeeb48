"""Linear adapters in one formula: a *piece* is what an adapter puts at one place.

    change()            the piece as an expression on the base weight; merge, unmerge, export, diagnosis, dial all read this
    forward(x, base)    the cheap way to the same thing; base(x) is what lies under the piece, base.weight its weight

`attach` leaves the model's own modules and parameter names untouched: it puts a callable in front of `module.forward`, and takes it
away again. Pieces live outside the model, so the base's state dict, its ties and its identity stay what they were, and with the
switch off the model *is* the base, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from temperament.delta import Change


class Piece(nn.Module):
    """One place's share of a linear adapter. Subclasses give `change`; `forward` may be overridden with something cheaper."""

    def change(self) -> Change:
        """The change of the base weight, in y = W x orientation (out, in); differentiable in the piece's parameters."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: Under) -> Tensor:
        return base(x) + base.map(x, self.change().delta(base.weight))


@dataclass(frozen=True)
class Under:
    """What lies under a piece at a place: callable, with the base's own weight and bias at hand.

    bare: nothing else is attached below, so a fused kernel may use weight and bias directly.
    """

    module: nn.Module
    call: Callable[..., Tensor]
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

    def __call__(self, x: Tensor) -> Tensor:
        return self.call(x)


@dataclass
class Switch:
    """Whether the pieces that share it take part in a forward pass."""

    on: bool = True


def attach(module: nn.Module, piece: Piece, switch: Switch) -> Callable[[], None]:
    """Put `piece` over `module`, above whatever is attached already. Returns the function that takes it away."""
    chain = module.__dict__.setdefault("_pieces", [])
    if not chain:
        module.__dict__["forward"] = partial(_through, module, type(module).forward.__get__(module), chain)
    link = (piece, switch)
    chain.append(link)

    def detach() -> None:
        chain.remove(link)
        if not chain:
            module.__dict__.pop("forward", None)
            module.__dict__.pop("_pieces", None)

    return detach


def _through(module: nn.Module, inner: Callable, chain: list, x: Tensor) -> Tensor:
    links = [piece for piece, switch in chain if switch.on]

    def call(x: Tensor, k: int) -> Tensor:
        if k < 0:
            return inner(x)
        return links[k](x, Under(module, lambda y: call(y, k - 1), bare=k == 0))

    return call(x, len(links) - 1)
