"""Merges that are trained: every weight of the base is a function of a few trained numbers and given changes.

The gradient of a number is the inner product of the weight's gradient with what the number multiplies, so no second copy of the
weights enters a graph, ties hold, and any module may be merged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from temperament.delta import Delta
from temperament.errors import UserError


def differences(base: Any, deltas: list[Delta], field: str) -> dict[str, Tensor]:
    """{name: (models, *shape)} what each delta does to each weight it or another changes; the base must be pure."""
    if base.originals:
        raise UserError(field, "start", "its changes are from the pure base; give this step `start: base`")
    known = dict(base.parameters())
    names = sorted({n for d in deltas for n in d.changes} & set(known))
    out = {}
    with torch.no_grad():
        for name in names:
            weight = known[name].detach()
            rows = [d.change(name).delta(weight).to(weight) if name in d.changes else torch.zeros_like(weight) for d in deltas]
            out[name] = torch.stack(rows)
    return out


def keep_originals(base: Any, names: Any) -> dict[str, Any]:
    """The parameters of these names, what they were noted as the base's own."""
    known = dict(base.parameters())
    for name in names:
        base.originals.setdefault(name, known[name].detach().clone())
    return {name: known[name] for name in names}


def add_grad(parameter: Any, grad: Tensor) -> None:
    parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
