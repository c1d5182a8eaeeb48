"""Which unit of one model is which of another: linear assignment on distances of activations or of weights.

    C[u, v] = -sum over readings |x1_u - x2_v|^2  =  2 <x1_u, x2_v> - |x1_u|^2 - |x2_v|^2

A reading is the output of a module on the same inputs, or an axis of a tensor. What is inside a unit (the values of a head) may
be in another order too, so C of two heads is that of the best order inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from temperament.errors import UserError
from temperament.nn.groups import Axis, Group, Seen, permuted

Reading = Axis | Seen


@dataclass
class Moments:
    """Of the entries of one reading in both models: inner products (entries, entries), squared lengths (entries,)."""

    cross: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Moments:
        """x, y (samples, entries)."""
        x, y = x.double(), y.double()
        return cls(x.T @ y, x.square().sum(0), y.square().sum(0))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.cross + other.cross, self.first + other.first, self.second + other.second)

    def score(self, at: Tensor, other: Tensor) -> Tensor:
        """C of units whose entries are at (units, k) in the first model and other (units, k) in the second."""
        lengths = self.first[at].sum(1)[:, None] + self.second[other].sum(1)[None]
        return 2 * sum(self.cross[at[:, j]][:, other[:, j]] for j in range(at.shape[1])) - lengths


def assign(score: Tensor) -> Tensor:
    """(units,) the unit of the second model for each of the first, with the largest sum of scores."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UserError("merge.pleas", "scipy", "matching units needs it; pip install 'temperament[merge]'") from None
    return torch.from_numpy(linear_sum_assignment(score.numpy(), maximize=True)[1])


Read = Callable[[Reading], Moments]


def total(one: Sequence[Reading], other: Sequence[Reading], read: Read) -> Tensor | float:
    """C summed over readings that stand for each other."""
    return sum(read(a).score(a.at, b.at) for a, b in zip(one, other, strict=True))


def match(group: Group, readings: Callable[[Group], Sequence[Reading]], read: Read) -> tuple[dict[str, Tensor], Tensor]:
    """({group: order} for the group and what is inside it, C of the matched units)."""
    n, own = group.units, readings(group)
    score = total(own, own, read) + torch.zeros(n, n, dtype=torch.float64)
    inner: dict[tuple[int, int, int], Tensor] = {}
    for k, kind in enumerate(group.inside):
        for u in range(n):
            for v in range(n):
                c = total(readings(kind[u]), readings(kind[v]), read)
                inner[k, u, v] = order = assign(c)
                score[u, v] += c[torch.arange(len(order)), order].sum()
    order = assign(score)
    orders = {group.name: order}
    for k, kind in enumerate(group.inside):
        orders |= {kind[u].name: inner[k, u, int(order[u])] for u in range(n)}
    return orders, score[torch.arange(n), order]


def by_activations(groups: Sequence[Group], moments: Mapping[tuple[str, str], Moments]) -> tuple[dict, dict]:
    """({group: order}, {group: C of matched units}); moments by (module, end)."""
    orders, scores = {}, {}
    for group in groups:
        found, scores[group.name] = match(group, lambda g: g.seen, lambda seen: moments[seen.module, seen.end])
        orders |= found
    return orders, scores


def by_weights(
    one: Mapping[str, Tensor], two: Mapping[str, Tensor], groups: Sequence[Group], rounds: int = 100
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same from the weights alone: group after group, the others held where they are, until none changes."""
    orders: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    for _ in range(rounds):
        changed = False
        for group in groups:
            own = {g.name for g in group.walk()}
            named = {a.tensor for g in group.walk() for a in g.axes}
            there = permuted({n: two[n] for n in named}, groups, {k: v for k, v in orders.items() if k not in own})
            held: dict[tuple[str, int], Moments] = {}

            def read(a: Axis, there=there, held=held) -> Moments:
                if (a.tensor, a.axis) not in held:
                    rows = [t[a.tensor].movedim(a.axis, -1).reshape(-1, t[a.tensor].shape[a.axis]) for t in (one, there)]
                    held[a.tensor, a.axis] = Moments.of(*rows)
                return held[a.tensor, a.axis]

            found, scores[group.name] = match(group, lambda g: [a for a in g.axes if a.compare], read)
            changed |= any(k not in orders or not torch.equal(orders[k], v) for k, v in found.items())
            orders |= found
        if not changed:
            break
    return orders, scores
