"""Two matched models in one of any width between one and two: units are merged, or stay apart and stand side by side.

    entries of every axis, in this order:   merged m, those of model 1 alone s1, those of model 2 alone s2

    out \\ in     m               s1          s2
    m       (W1 + W2) / 2     W1 / 2      W2 / 2
    s1           W1             W1           0
    s2           W2              0          W2

Model 2 is in model 1's order already. An axis of no group, or of a group that stays, is all m. Vectors count as read from m.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from temperament.nn.groups import Axis, Group

FIRST = torch.tensor([[0.5, 0.5, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
SECOND = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]])


@dataclass(frozen=True)
class Entries:
    """Of one axis of the result: where each entry stands in the models, and its kind (0 merged, 1, 2)."""

    at: Tensor
    kind: Tensor
    side: str

    @classmethod
    def same(cls, n: int, side: str = "out") -> Entries:
        return cls(torch.arange(n), torch.zeros(n, dtype=torch.long), side)

    def gather(self, x: Tensor, y: Tensor) -> Tensor:
        """Activations (..., entries) of the result, from those of the models."""
        x, y = x[..., self.at], y[..., self.at]
        return torch.where(self.kind == 0, (x + y) / 2, torch.where(self.kind == 1, x, y))


Layout = dict[tuple[str, int], Entries]


def layout(state: Mapping[str, Tensor], groups: Sequence[Group], apart: Mapping[str, Tensor]) -> Layout:
    """{(tensor, axis): its entries in the result}. apart: {group: units that are not merged}."""
    found: dict[tuple[str, int], list[tuple[Group, Axis]]] = {}
    for group in groups:
        for a in group.axes:
            found.setdefault((a.tensor, a.axis), []).append((group, a))
    out: Layout = {}
    for (name, axis), members in found.items():
        at, kinds = [], []
        for group, units in _segments(members):
            alone = torch.zeros(len(units), dtype=torch.bool)
            if group.name in apart:
                alone[apart[group.name]] = True
            for kind, rows in ((0, units[~alone]), (1, units[alone]), (2, units[alone])):
                at.append(rows.reshape(-1))
                kinds.append(torch.full((rows.numel(),), kind))
        entries = Entries(torch.cat(at), torch.cat(kinds), members[0][1].side)
        assert len(entries.at.unique()) == state[name].shape[axis], f"{name} has entries of no group"
        out[name, axis] = entries
    return out


def _segments(members: list[tuple[Group, Axis]]) -> list[tuple[Group, Tensor]]:
    """(group, units) in the order they stand; what one group has in several places of a unit's own stretch is one segment."""
    by_group: dict[str, list[tuple[Group, Axis]]] = {}
    for group, a in members:
        by_group.setdefault(group.name, []).append((group, a))
    out = []
    for own in by_group.values():
        whole = torch.cat([a.at for _, a in own], 1).sort(1).values
        if len(own) > 1 and bool((whole[:, -1] - whole[:, 0] == whole.shape[1] - 1).all()):
            out.append((own[0][0], whole))
        else:
            out += [(group, a.at) for group, a in own]
    return sorted(out, key=lambda item: int(item[1].min()))


def joined(one: Mapping[str, Tensor], two: Mapping[str, Tensor], where: Layout) -> dict[str, Tensor]:
    """The tensors of the result; whole numbers are the first model's."""
    out = {}
    for name, w in one.items():
        if not w.is_floating_point():
            out[name] = w.clone()
            continue
        axes = {axis: e for (n, axis), e in where.items() if n == name}
        x, y = w, two[name]
        for axis, e in axes.items():
            x, y = x.index_select(axis, e.at), y.index_select(axis, e.at)
        rows = next((i for i in axes.items() if i[1].side == "out"), None)
        columns = next((i for i in axes.items() if i[1].side == "in"), None)
        none = torch.zeros(1, dtype=torch.long)
        r, c = (rows[1].kind if rows else none), (columns[1].kind if columns else none)
        shape = [1] * w.dim()
        for item in (rows, columns):
            if item:
                shape[item[0]] = len(item[1].kind)
        put = lambda table, r=r, c=c, rows=rows, columns=columns, shape=shape, w=w: (
            (table[r][:, c] if not (rows and columns and columns[0] < rows[0]) else table[r][:, c].T).reshape(shape).to(w)
        )
        out[name] = x * put(FIRST) + y * put(SECOND)
    return out
