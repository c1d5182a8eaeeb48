"""Units of a model that may change places without changing what it computes, and all the tensors in which they must do so.

    groups = groups_of(model)                      residual stream, hidden units of each MLP, attention heads and what is inside
    permuted(state, groups, {"residual": order})   the same function, other weights

A *unit* is one entry or one block of entries of an axis: a hidden unit, a channel, a head with its rows. `Axis.at` says which
entries (units, entries of one). Transformers are read off their places; plain networks are traced (`groups_traced.py`). With
rotary positions the rows of q and k stay in their order within a head; without, they may move together. Groups inside the
units of another (the values of one head) are listed for each unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from temperament.errors import UserError
from temperament.nn.places import Place, Places


@dataclass(frozen=True, eq=False)
class Axis:
    """Where units lie in a tensor. side: do they come out of this map, or go into it. compare: do they tell units apart here
    (False where their order within another group is not known yet)."""

    tensor: str
    axis: int
    at: Tensor  # (units, entries of a unit) along the axis
    side: Literal["out", "in"] = "out"
    compare: bool = True


@dataclass(frozen=True, eq=False)
class Seen:
    """Where the activations of units can be read: a module's output (or input), its last axis or its channels."""

    module: str
    at: Tensor
    end: Literal["output", "input"] = "output"
    channel: int = -1


@dataclass(frozen=True, eq=False)
class Group:
    """Units that move together. inside: of each kind of inner group, one a unit. wide: a model may have more of them."""

    name: str
    axes: tuple[Axis, ...]
    seen: tuple[Seen, ...] = ()
    inside: tuple[tuple[Group, ...], ...] = ()
    wide: bool = True

    @property
    def units(self) -> int:
        return len(self.axes[0].at)

    def walk(self) -> Iterator[Group]:
        """Itself, then what is inside its units."""
        yield self
        for kind in self.inside:
            yield from kind


Orders = Mapping[str, Tensor]  # {group: order}; unit u of the permuted model is unit order[u] of the other


def index(state: Mapping[str, Tensor], groups: Sequence[Group], orders: Orders) -> dict[tuple[str, int], Tensor]:
    """{(tensor, axis): which entry of the axis comes where}."""
    out: dict[tuple[str, int], Tensor] = {}
    for group in (g for top in groups for g in top.walk()):
        if group.name not in orders:
            continue
        for a in (a for a in group.axes if a.tensor in state):
            size = state[a.tensor].shape[a.axis]
            step = torch.arange(size)
            step[a.at.reshape(-1)] = a.at[orders[group.name]].reshape(-1)
            key = (a.tensor, a.axis)
            out[key] = out[key][step] if key in out else step
    return out


def permuted(state: Mapping[str, Tensor], groups: Sequence[Group], orders: Orders) -> dict[str, Tensor]:
    out = dict(state)
    for (name, axis), order in index(state, groups, orders).items():
        out[name] = out[name].index_select(axis, order.to(out[name].device))
    return out


def groups_of(model: nn.Module, example: Any = None) -> list[Group]:
    """The groups of a transformer with one stack of blocks, or of a plain network (traced with `example`, its input)."""
    if hasattr(model, "config"):
        return of_transformer(model)
    from temperament.nn.groups_traced import traced

    return traced(model, example)


# ---- transformers ----------------------------------------------------------------------------------------------------------

STREAM_IN = {"q", "k", "v", "qkv", "gate", "up", "gate_up", "head"}  # they read the residual stream
STREAM_OUT = {"embed", "position", "type", "token", "patch", "norm", "o", "down"}  # they write it, or stand in it


def of_transformer(model: nn.Module) -> list[Group]:
    places = Places.of({"model": model})
    blocks = places.blocks()
    if len({b.stack for b in blocks}) != 1:
        raise UserError("model", type(model).__name__, "units are matched in models with one stack of blocks")
    odd = [p for p in places if p.role not in STREAM_IN | STREAM_OUT | {"q_norm", "k_norm"} or p.experts or p.cross]
    if odd:
        raise UserError("model", odd[0].path, f"units of a place like this ({odd[0].role}) are not known how to match")
    seen, parameters, stream, top = set(), {}, [], []
    for p in places:
        for which, name in p.parameters.items():
            if id(p.parameter(which)) not in seen:
                seen.add(id(p.parameter(which)))
                parameters[name.partition("/")[2]] = (p, which)
    for name, (p, which) in parameters.items():
        at = _stream_axis(p, which)
        if at is not None:
            n = p.parameter(which).shape[at]
            stream.append(Axis(name, at, torch.arange(n)[:, None], "in" if p.role in STREAM_IN else "out"))
    width = len(stream[0].at)
    if any(len(a.at) != width for a in stream):
        raise UserError("model", type(model).__name__, "its residual stream has more than one width, which is not matched")
    ends = tuple(Seen(b.name.partition("/")[2], torch.arange(width)[:, None]) for b in blocks)
    top.append(Group("residual", tuple(stream), ends, wide=False))
    free = not any("Rotary" in type(m).__name__ for m in model.modules())  # rows of q and k have no order of their own
    resized = "head_dim" in vars(model.config)
    for b in blocks:
        top += _hidden(b.places, f"block {b.depth}")
        top += _heads(b.places, f"block {b.depth}", free, resized)
    return top


def _stream_axis(p: Place, which: str) -> int | None:
    """The axis of a parameter that is the residual stream."""
    if p.role in ("q_norm", "k_norm") or (p.role in STREAM_IN and p.parameter(which).dim() == 1):
        return None
    if which == "bias" or p.role == "norm":
        return 0
    if p.role in ("embed", "position", "type", "token"):
        return p.parameter(which).dim() - 1
    if p.role == "patch":
        return 0
    return int((p.role in STREAM_IN) != p.transposed)


def _axis(p: Place, at: Tensor, side: Literal["out", "in"], compare: bool = True) -> list[Axis]:
    """The rows (or columns) of a linear map, and its bias where they are rows."""
    names = {which: name.partition("/")[2] for which, name in p.parameters.items()}
    weight = Axis(names["weight"], int((side == "in") != p.transposed), at, side, compare)
    return [weight] + ([Axis(names["bias"], 0, at, "out", compare)] if side == "out" and "bias" in names else [])


def _hidden(places: Sequence[Place], name: str) -> list[Group]:
    axes, seen = [], []
    for p in places:
        if p.role in ("gate", "up", "gate_up"):
            for role in ("gate", "up") if p.role == "gate_up" else (p.role,):
                axes += _axis(p, p.rows(role)[:, None], "out")
        elif p.role == "down":
            n = p.shape[1]
            axes += _axis(p, torch.arange(n)[:, None], "in")
            seen.append(Seen(p.path, torch.arange(n)[:, None], "input"))
    return [Group(f"{name} hidden", tuple(axes), tuple(seen))] if axes else []


def _heads(places: Sequence[Place], name: str, free: bool, wide: bool) -> list[Group]:
    """Key heads with the query heads that read them; inside each: query heads, values, and (free) rows of q and k."""
    found = {}
    for p in places:
        for role in p.roles:
            if role in ("q", "k", "v"):
                found[role] = (p, p.rows(role))
        if p.role == "o":
            found["o"] = (p, torch.arange(p.shape[1]))
    if not found:
        return []
    p = found["q"][0]
    heads, keys = p.heads, p.kv_heads or p.heads
    each, v = heads // keys, len(found["v"][1]) // keys
    grid = {"q": found["q"][1].view(keys, each, -1), "k": found["k"][1].view(keys, 1, -1), "v": found["v"][1].view(keys, 1, v),
            "o": found["o"][1].view(keys, each, v)}  # fmt: skip
    moves = {"q": each > 1 or free, "k": free, "v": True, "o": True}  # their order inside a head is found after the heads'

    def of(role: str, at: Tensor, compare: bool = True) -> list[Axis]:
        return _axis(found[role][0], at, "in" if role == "o" else "out", compare)

    def see(role: str, at: Tensor) -> Seen:
        return Seen(found[role][0].path, at)

    inside = []
    if each > 1:
        inside.append(tuple(
            Group(f"{name} head {h} queries", (*of("q", grid["q"][h], not free), *of("o", grid["o"][h], False)),
                  () if free else (see("q", grid["q"][h]),))
            for h in range(keys)))  # fmt: skip
    if free:
        rows = lambda role, h: grid[role][h].T
        inside.append(tuple(
            Group(f"{name} head {h} keys", (*of("k", rows("k", h)), *of("q", rows("q", h), each == 1)),
                  (see("k", rows("k", h)), *((see("q", rows("q", h)),) if each == 1 else ())))
            for h in range(keys)))  # fmt: skip
    inside.append(tuple(
        Group(f"{name} head {h} values", (*of("v", grid["v"][h].T), *of("o", grid["o"][h].T, each == 1)),
              (see("v", grid["v"][h].T),))
        for h in range(keys)))  # fmt: skip
    axes = [a for role in "qkvo" for a in of(role, grid[role].reshape(keys, -1), not moves[role])]
    seen = [see(role, grid[role].reshape(keys, -1)) for role in "qk" if not moves[role]]
    return [Group(f"{name} heads", tuple(axes), tuple(seen), tuple(inside), wide)]
