"""Linear maps that read one tensor computed as one product: q, k, v of an attention, gate and up of an MLP.

    with joint(model):          weights must not change in place inside
        ...                     every call of the first of a group computes all of it, the others take their share

A small product costs as much for being called as for its sums: at 64 rows of width 192 one product of 512 columns runs at
half the speed of one of 1,024. Which maps read one tensor is not guessed from names: it is seen once for each model, on a
tiny forward. A group whose weights would take more than LARGEST bytes as a copy is left alone, and so is every map with a
piece or a hook on it. While another version's weights hang on a map, it computes with those."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temperament.nn import forward
from temperament.nn.forward import Model

LARGEST = 1 << 22  # bytes of a group's weights
_seen: WeakKeyDictionary[nn.Module, list[list[ref]]] = WeakKeyDictionary()


@contextmanager
def joint(model: Model) -> Iterator[None]:
    """Inside, groups of small maps are one product each, with the weights that the model has now."""
    with ExitStack() as stack:
        with forward.active(model):
            for group in groups(model):
                if all(_plain(m) for m in group):
                    stack.enter_context(_joined(group))
        yield


def groups(model: Model) -> list[list[nn.Linear]]:
    """The maps of a decoder that read one tensor, in the order in which they read it."""
    module = forward.module_of(model)
    if module not in _seen:
        _seen[module] = [[ref(m) for m in group] for group in _watch(model, module)]
    found = ([r() for r in group] for group in _seen[module])
    return [group for group in found if all(m is not None for m in group)]


def _plain(m: nn.Module) -> bool:
    return type(m) is nn.Linear and "forward" not in m.__dict__ and not (m._forward_hooks or m._forward_pre_hooks)


def _small(group: list[nn.Linear]) -> bool:
    return len(group) > 1 and sum(m.weight.nbytes for m in group) <= LARGEST and len({m.bias is None for m in group}) == 1


def _watch(model: Model, module: nn.Module) -> list[list[nn.Linear]]:
    if forward.kind(model) != "decoder":
        return []
    calls: list[tuple[nn.Linear, Tensor]] = []
    watched = [m for m in module.modules() if _plain(m)]
    handles = [m.register_forward_pre_hook(lambda m, args: calls.append((m, args[0]))) for m in watched]
    try:
        with forward.measuring(module), forward.active(model):
            model(input_ids=torch.tensor([forward.ordinary_ids(module)[:2]], device=forward.device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    found: list[list[nn.Linear]] = []
    for k, (m, x) in enumerate(calls):
        if k and x is calls[k - 1][1]:
            found[-1].append(m)
        else:
            found.append([m])
    once = lambda group: len(set(group)) == len(group) and all(sum(m is c for c, _ in calls) == 1 for m in group)
    return [group for group in found if _small(group) and once(group)]


@contextmanager
def _joined(group: list[nn.Linear]) -> Iterator[None]:
    weights = [m.weight for m in group]
    W = torch.cat([w.detach() for w in weights])
    b = None if group[0].bias is None else torch.cat([m.bias.detach() for m in group])
    sizes, held = [m.out_features for m in group], [None, ()]  # what was read, and each map's share of the product

    def first(x: Tensor) -> Tensor:
        if group[0].weight is not weights[0] or torch.is_grad_enabled():
            return F.linear(x, group[0].weight, group[0].bias)
        held[:] = x, F.linear(x, W, b).split(sizes, -1)
        return held[1][0]

    def other(i: int):
        def share(x: Tensor) -> Tensor:
            m = group[i]
            if x is not held[0] or m.weight is not weights[i] or torch.is_grad_enabled():
                return F.linear(x, m.weight, m.bias)
            out = held[1][i]
            if i + 1 == len(group):
                held[:] = None, ()
            return out

        return share

    calls = [first, *(other(i) for i in range(1, len(group)))]
    for m, call in zip(group, calls, strict=True):
        m.__dict__["forward"] = call
    try:
        yield
    finally:
        for m, call in zip(group, calls, strict=True):
            if m.__dict__.get("forward") is call:
                del m.__dict__["forward"]
