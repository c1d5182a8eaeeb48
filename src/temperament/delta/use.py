"""A delta put on weights: a new dict of tensors, or modules changed in place, tied tensors once, nothing half done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from temperament.delta.stream import storage
from temperament.errors import UserError, nearest

if TYPE_CHECKING:
    from temperament.delta.delta import Delta


def new_value(delta: Delta, name: str, weight: Tensor) -> Tensor:
    """The tuned value of one base tensor, in its dtype and on its device; the tensor itself where nothing changes."""
    change = delta.change(name)
    if change.weight_shape is not None and change.weight_shape != tuple(weight.shape):
        mend = f"the delta was made for {list(change.weight_shape)}; use its base"
        raise UserError(f"shape of {name}", list(weight.shape), mend)
    if any(t.device != weight.device for t in change.tensors().values()):
        change = change.mapped(lambda t: t.to(weight.device))
    return change.apply(weight)


@torch.no_grad()
def apply(delta: Delta, to, build: Callable | None = None):
    """See `Delta.apply`."""
    shipped = {n: a for n, a in delta.additions.items() if a.ship}
    if shipped and build is None:
        raise UserError("delta", min(shipped), "it adds a module; load it through its part, it is not a change of weights")
    if _is_modules(to):
        for name, target in _targets(delta, to).items():
            if (new := new_value(delta, name, target)) is not target:
                target.copy_(new)
    else:
        to = {**to, **_updated(delta, to)}
    for name, addition in shipped.items():
        build(name, replace(addition, strength=addition.strength * delta.strength), to)
    return to


def _updated(delta: Delta, to: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The new tensors of a dict, under every name that shares the tensor."""
    bare = not any("/" in name for name in to)
    if bare and len(delta.components) > 1:
        raise UserError("components", delta.components, "name the tensors component/parameter, this delta touches several")
    tied: dict[tuple, list[str]] = {}
    for key, t in to.items():
        tied.setdefault(storage(t) if t.numel() else (key,), []).append(key)
    new: dict[str, Tensor] = {}
    for name in (*delta.changes, *delta.buffers):
        key = name.split("/", 1)[1] if bare else name
        if key not in to:
            raise UserError("parameter", name, f"the weights have no such tensor; {nearest(key, to)}")
        value = new_value(delta, name, to[key])
        names = tied[storage(to[key])] if to[key].numel() else [key]
        if key in new and not torch.equal(new[key], value):
            raise UserError("tied tensors", name, f"it is one of {names}, and the delta changes them differently")
        new |= dict.fromkeys(names, value)
    return new


@contextlib.contextmanager
def applied(delta: Delta, to) -> Iterator[Any]:
    """See `Delta.applied`. Keeps a copy of the tensors it changes, and of no other."""
    assert _is_modules(to), "needs modules"
    kept = []
    try:
        with torch.no_grad():
            for name, target in _targets(delta, to).items():
                if (new := new_value(delta, name, target)) is not target:
                    kept.append((target, target.detach().clone()))
                    target.copy_(new)
        yield to
    finally:
        with torch.no_grad():
            for target, old in kept:
                target.copy_(old)


def _is_modules(to) -> bool:
    return isinstance(to, nn.Module) or (bool(to) and all(isinstance(value, nn.Module) for value in to.values()))


def _targets(delta: Delta, to: nn.Module | Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """{name: tensor of the module}, each tensor once. All is checked before anything is changed: names, shapes, and that the
    names of a tied tensor agree on its new value (else a merge has split what the model shares)."""
    if isinstance(to, nn.Module):
        if len(delta.components) > 1:
            raise UserError("components", delta.components, "pass {component: module}, this delta touches several")
        to = {part: to for part in delta.components}
    found = {}
    for part, module in to.items():
        found |= {f"{part}/{n}": p for n, p in module.named_parameters(remove_duplicate=False)}
        found |= {f"{part}/{n}": b for n, b in module.named_buffers(remove_duplicate=False)}
    targets: dict[int, str] = {}
    for name in sorted({*delta.changes, *delta.buffers}):
        if name not in found:
            raise UserError("parameter", name, f"the model has no such tensor; {nearest(name, found)}")
        target, first = found[name], targets.setdefault(id(found[name]), name)
        shape = delta.change(name).weight_shape
        if shape is not None and shape != tuple(target.shape):
            raise UserError(f"shape of {name}", list(target.shape), f"the delta was made for {list(shape)}; use its base")
        if first != name and not torch.equal(new_value(delta, first, target), new_value(delta, name, target)):
            raise UserError("tied tensors", name, f"it is one tensor with {first!r} but the delta changes them differently")
    return {name: found[name] for name in targets.values()}
