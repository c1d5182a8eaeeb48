"""Training some entries of a tensor while holding state for those alone.

    values = W[entries]      (k,) the leaf the optimizer sees: its gradient, clipping, moments, decay all have length k
    backward                 the dense gradient of W is gathered at `entries` once it is whole, added to values.grad, and freed
    after a step             W[entries] = values

So any optimizer trains any mask, dense gradients never exist for two tensors at a time, and an entry outside the mask
cannot move. A mask may move: `repack` takes the optimizer's state along, by a rule the parameter declares.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from temperament.train.trained import Param


def values_at(weight: Tensor, entries: Tensor) -> nn.Parameter:
    """The packed leaf: a copy of the weight's entries at these flat positions."""
    return nn.Parameter(weight.detach().reshape(-1)[entries].clone())


def gather(param: Param) -> Any:
    """Hook the dense weight so that its gradient goes to the packed values at once; returns the handle."""

    def collect(weight: Tensor) -> None:
        found = weight.grad.reshape(-1)[param.entries]
        param.tensor.grad = found if param.tensor.grad is None else param.tensor.grad.add_(found)
        weight.grad = None

    return param.dense.register_post_accumulate_grad_hook(collect)


@torch.no_grad()
def put(param: Param) -> None:
    """Write the packed values into the weight."""
    param.dense.view(-1)[param.entries] = param.tensor


@torch.no_grad()
def take(param: Param) -> None:
    """Read the packed values from the weight."""
    param.tensor.data = param.dense.view(-1)[param.entries].clone()


@torch.no_grad()
def repack(param: Param, entries: Tensor, state: MutableMapping[Any, dict[str, Any]]) -> None:
    """Move the mask of a parameter to `entries`; `state` is the optimizer's, by tensor.

    "carry": state of an entry that stays goes with it and a new entry's is zero; "reset": all of it is zero. What is not kept
    entry by entry (the step count of bias corrections) stays as it is under both.
    """
    old, k = param.entries, param.tensor.shape
    for key, value in state.get(param.tensor, {}).items():
        if not isinstance(value, Tensor) or value.shape != k:
            continue
        new = value.new_zeros(len(entries))
        if param.moves == "carry":
            dense = value.new_zeros(param.dense.numel())
            dense[old] = value
            new = dense[entries]
        state[param.tensor][key] = new
    param.entries = entries
    take(param)
