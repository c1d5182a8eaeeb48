"""Packing: several documents in one row, so that less of a batch is padding. Nothing leaks: `Tokens.segments` tells them apart.

Best fit decreasing: documents in order of falling length (ties in the given order), each into the fullest row that still takes
it. A pure function of the lengths and their order; the number of rows depends on the lengths alone. At most 22 % more rows than
the best packing has, far fewer with many short documents (Johnson et al. 1974). O(n log length).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

from temperament.engine.encoded import Encoded
from temperament.errors import UserError


@dataclass(frozen=True)
class Fill:
    """How full rows are. rate: share of `rows * length` that is tokens of documents."""

    rows: int
    documents: int
    tokens: int
    length: int

    @property
    def rate(self) -> float:
        return self.tokens / max(self.rows * self.length, 1)


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which items go into one row of `room` tokens: lists of indices, rows in the order they were opened."""
    assert all(0 < n <= room for n in lengths), "an item must fit into an empty row"
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # room left -> rows, the oldest last
    rooms: list[int] = []  # the keys of open_rows, rising
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        k = bisect_left(rooms, lengths[i])
        if k == len(rooms):
            row, left = len(rows), room
            rows.append([])
        else:
            left = rooms[k]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del open_rows[left], rooms[k]
        rows[row].append(i)
        left -= lengths[i]
        if left:
            if left not in open_rows:
                open_rows[left] = []
                insort(rooms, left)
            open_rows[left].append(row)
    return rows


def pack(documents: Sequence[Encoded], length: int, split: bool = False) -> list[list[Encoded]]:
    """Rows of at most `length` tokens. A document that is longer is refused by name, or with `split` cut into pieces, which
    are documents of their own: no piece sees the one before it, and its first token is not predicted."""
    whole: list[Encoded] = []
    for d in documents:
        if len(d) <= length:
            whole.append(d)
        elif split:
            whole.extend(_pieces(d, length))
        else:
            raise UserError("pack", length, f"{d.origin} is {len(d)} tokens long; raise pack, or set max_length and truncate")
    return [[whole[i] for i in row] for row in best_fit([len(d) for d in whole], length)]


def _pieces(d: Encoded, length: int) -> list[Encoded]:
    starts = range(0, len(d), length)
    cut = lambda a: replace(
        d, ids=d.ids[a : a + length], weights=[0.0, *d.weights[a + 1 : a + length]], roles=(), meta=d.meta if a == 0 else {}
    )
    return [cut(a) for a in starts]


def fill(rows: Sequence[Sequence[Encoded]], length: int) -> Fill:
    return Fill(len(rows), sum(map(len, rows)), sum(len(d) for row in rows for d in row), length)
