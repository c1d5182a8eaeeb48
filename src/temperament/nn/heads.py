"""Hidden states for heads that read a language model beside its own output head: values, rewards, correctness of a step.

    states(model, tokens) -> (rows, T, width)    at t the last hidden state that predicts ids[t]: the state *before* token t

A policy's heads read what it sees and plans (`nn/batch.py`, Steps); `tokens.states(model)` is the one call for both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from temperament.errors import UserError
from temperament.nn import forward
from temperament.nn.batch import Tokens
from temperament.nn.forward import Model


def width(model: Model) -> int:
    """How wide the states of this model are. Raises UserError where there is nothing for a head to read."""
    module = forward.module_of(model)
    own = getattr(getattr(module, "config", None), "features", None)
    if isinstance(own, int):
        return own
    if forward.head_of(model) is None:
        raise UserError(
            "head", type(module).__name__, "this base has no output head to stand beside; use a language model or a policy"
        )
    return module.config.get_text_config().hidden_size


def states(model: Model, tokens: Tokens, given: dict[str, Any] | Tokens | None = None) -> Tensor:
    """(rows, T, width), 0 where a token carries no weight. The output head is not computed but for one position."""
    head = forward.head_of(model)
    if head is None:
        raise UserError(
            "head", type(forward.module_of(model)).__name__, "this model names no output head beside which another could read"
        )
    kept: list[Tensor] = []

    def catch(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kept.append(args[0])
        return (args[0][:, :1], *args[1:]), kwargs

    with forward.active(model):
        hook = head.register_forward_pre_hook(catch, prepend=True, with_kwargs=True)
        try:
            model(**forward.inputs(model, tokens, given))
        finally:
            hook.remove()
    hidden = kept[0][:, kept[0].shape[1] - tokens.ids.shape[1] :]
    shift = forward.shift(model)
    if shift:
        hidden = torch.cat([torch.zeros_like(hidden[:, :shift]), hidden[:, :-shift]], 1)
    return hidden * (tokens.weights != 0)[..., None]
