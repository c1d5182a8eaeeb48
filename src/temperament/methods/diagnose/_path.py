"""What lies between a base and what it was tuned to: the model at any point between, layer by layer, and its loss there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from temperament.delta.depth import block_of
from temperament.delta.use import new_value
from temperament.engine.own import own_texts
from temperament.errors import UserError
from temperament.nn import forward
from temperament.nn.batch import Tokens
from temperament.nn.logprobs import label, score
from temperament.train.context import Context
from temperament.train.world import World


class Path:
    """start, end: {name: tensor} of what the change touches. layers: {block, or "outside" of all: names}."""

    def __init__(self, subject: Any, field: str):
        if subject.delta is None or not subject.delta.changes:
            raise UserError(field, "no change", "it looks at the way from a base to what was tuned from it; give both")
        self.base = subject.base
        self.parameters: dict[str, nn.Parameter] = {n: p for n, p in self.base.parameters() if n in subject.delta.changes}
        self.start = {n: self.base.originals.get(n, p.detach()).clone() for n, p in self.parameters.items()}
        self.end = {n: new_value(subject.delta, n, w).to(w) for n, w in self.start.items()}
        self.layers: dict[str, list[str]] = {}
        for name in self.parameters:
            at = block_of(name)
            self.layers.setdefault("outside" if at is None else f"{at[0].partition('/')[2]}.{at[1]}", []).append(name)

    @contextmanager
    def at(self, share: float | Mapping[str, float]) -> Iterator[dict[str, nn.Parameter]]:
        """The model at (1 - share) start + share * end; shares may be given by layer (those not named: at the end)."""
        known = dict(self.base.parameters())
        kept = {n: p.data for n, p in self.parameters.items()}
        try:
            for layer, names in self.layers.items():
                a = share.get(layer, 1.0) if isinstance(share, Mapping) else share
                for n in names:
                    whole = self.start[n] if a == 0 else self.end[n] if a == 1 else torch.lerp(self.start[n], self.end[n], a)
                    known[n].data = whole.clone()
            yield known
        finally:
            for n, w in kept.items():
                self.parameters[n].data = w


def rows_of(base: Any, data: Any, rows: int, length: int, field: str) -> list[Tokens]:
    """Rows of a source; without one, texts the model writes itself."""
    if data is None:
        return own_texts(base.model, rows, length)
    stream = data.open(Context(base, World()))
    batches = [stream.batch(step) for step in range(-(-rows // 16))]
    if any(not isinstance(b, Tokens) for b in batches):
        raise UserError(field, type(data).part_name, "give rows of text")
    return batches


def loss_of(model: nn.Module, batches: list[Tokens]) -> Callable[[], Tensor]:
    """The mean negative log-likelihood of the weighted tokens, nats a token."""
    device, count = forward.device_of(model), sum(b.trained for b in batches)

    def loss() -> Tensor:
        total = torch.zeros((), device=device)
        for b in (b.to(device) for b in batches):
            total = total - (score(model, b, label())["label"] * b.weights).sum()
        return total / count

    return loss
