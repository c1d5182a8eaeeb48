"""Heads that name classes beside the one a base was made with: what an adapter hangs on a model.

    heads(model) -> {name: ClassHead}       those that take part in it as it is now (none in the version "base")

A head stands around the whole model and leaves what that says as it was, so the base's own classes can still be asked; its
logits are asked for by name, of the features it `reads` (`engine/see.py`): the base's pooled ones, or what it has computed
beside the model in the same forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from temperament.nn.forward import Model, active, module_of
from temperament.nn.pieces import Around, Under


class ClassHead(Around):
    """logits = strength * (W h + b);   h (rows, width) pooled features, logits (rows, classes)."""

    starts_at_zero = False  # without it there are no such classes: a reference must keep it

    def __init__(self, width: int, name: str, classes: Sequence[str]):
        super().__init__()
        self.name, self.classes = name, tuple(classes)
        self.linear = nn.Linear(width, len(self.classes))
        with torch.no_grad():
            self.linear.weight.zero_(), self.linear.bias.zero_()

    def forward(self, base: Under, *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs)

    def reads(self, pooled: Tensor) -> Tensor:
        """Its features, in the forward that gave the model's pooled ones."""
        return pooled

    def logits(self, features: Tensor) -> Tensor:
        return self.strength * self.linear(features.to(self.linear.weight.dtype))


def heads(model: Model) -> dict[str, ClassHead]:
    """In the order in which they were hung."""
    with active(model):
        links = module_of(model).__dict__.get("_pieces", ())
        return {piece.name: piece for piece, switch in links if switch.on and isinstance(piece, ClassHead)}
