"""Merges that are trained: every weight of the base is a function of a few trained numbers and given changes.

The gradient of a number is the inner product of the weight's gradient with what the number multiplies, so no second copy of the
weights enters a graph, ties hold, and any module may be merged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from temperament.delta import Delta
from temperament.delta.merge_run import averaged_additions
from temperament.errors import UserError
from temperament.parts import build


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
            moved = lambda d, n=name, w=weight: d.change(n).delta(w.cpu()).to(w) if n in d.changes else torch.zeros_like(w)
            rows = [moved(d) for d in deltas]
            out[name] = torch.stack(rows)
    return out


def modules(base: Any, deltas: list[Delta]) -> tuple[dict[str, Any], dict[str, tuple[nn.Parameter, Tensor]]]:
    """What the deltas add to the base, built once by its part, with the mean of its tensors: ({name: (module, what stands
    around it)}, {"name::tensor": (parameter, (models, *shape) as each delta has it)}). All must bring the same."""
    brought = [{n: a for n, a in d.baked().additions.items() if a.ship} for d in deltas]
    around, tensors = {}, {}
    for name, mean in averaged_additions([Delta(additions=b) for b in brought], [1.0] * len(deltas)).items():
        if any(name not in b for b in brought):
            mend = "one of the models does not bring it, so there is nothing to mix; restrict the others"
            raise UserError("addition", name, mend)
        module, piece = build({mean.part: dict(mean.config)}).rebuild(base, name, mean)
        piece.to(next(module.parameters()).device).requires_grad_(False)
        around[name] = (module, piece)
        if dict(piece.named_parameters()).keys() != mean.tensors.keys():
            mend = f"{mean.part} does not say which of its parameters each tensor is; restrict it"
            raise UserError("addition", name, mend)
        for key, p in piece.named_parameters():
            tensors[f"{name}::{key}"] = (p, torch.stack([b[name].tensors[key].to(p) for b in brought]))
    return around, tensors


def keep_originals(base: Any, names: Any) -> dict[str, Any]:
    """The parameters of these names, what they were noted as the base's own."""
    known = dict(base.parameters())
    for name in names:
        base.originals.setdefault(name, known[name].detach().clone())
    return {name: known[name] for name in names}


def add_grad(parameter: Any, grad: Tensor) -> None:
    parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
