"""A full training step - forward, loss, backward, clip to 1, AdamW, gradients cleared - ours through the library's own loop, and the
plain one that others' adapters are trained with. All positions are trained; rows are equally long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.models import base_of
from temperament.methods.objectives.sft.cross_entropy import CrossEntropy
from temperament.methods.optim.adamw import AdamW
from temperament.nn.batch import Tokens
from temperament.train.context import Context
from temperament.train.live import Live
from temperament.train.loop import Player, Views, train
from temperament.train.world import World

ROWS, LENGTH = 8, 64
RATE = 1e-4


def ids_of(vocabulary: int, rows: int = ROWS, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


def floor(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of the frozen model, with gradients to its activations only."""
    model.requires_grad_(False)
    embed = model.get_input_embeddings()

    def step() -> None:
        model(inputs_embeds=embed(ids).requires_grad_(True), labels=ids, use_cache=False).loss.backward()

    return step


def plain(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """The bare loop over whatever of the model requires gradients."""
    params = [p for p in model.parameters() if p.requires_grad]
    stepper = torch.optim.AdamW(params, lr=RATE, fused=True)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        stepper.step()
        stepper.zero_grad(set_to_none=True)

    return step


class Endless:
    """A stream that gives one batch again and again."""

    def __init__(self, batch: Any):
        self.it = batch

    def batch(self, step: int, progress: Any = None) -> Any:
        return self.it


def ours(model: torch.nn.Module, ids: torch.Tensor, trainable: Any) -> Callable[[], None]:
    """One step of train/loop.py with this trainable, cross-entropy and AdamW; the loss and the gradient norm are recorded."""
    base, world = base_of(model), World()
    ctx = Context(base, world, batch=len(ids), micro=len(ids))
    live = Live(base, [trainable.build(base, ctx)])
    optimizer = AdamW(lr=RATE)
    player = Player(
        "policy",
        live,
        optimizer,
        optimizer.build(list(live.params.values()), ctx),
        {"Tokens": CrossEntropy()},
        [],
        Views(live, world, len(ids), 0),
    )
    weights = torch.ones(ids.shape)
    weights[:, 0] = 0
    examples = torch.arange(len(ids))[:, None].expand_as(ids).contiguous()
    stream = Endless(Tokens(ids, weights, torch.zeros_like(ids), examples))
    return lambda: train([player], stream, 1, micro=len(ids)) and None
