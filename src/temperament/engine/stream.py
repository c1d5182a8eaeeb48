"""The order in which a data set is seen: batch k is a pure function of (seed, k), so resuming needs no state.

    epoch e      rows in the order permutation(n, seed, purpose, e)          draws by address: nothing to save
    batch k      rows [i * batch, (i + 1) * batch) of epoch e,               e, i = divmod(k, steps_per_epoch)
    mixture      after batch k, source i has given weight_i * batch * (k + 1) rows, rounded: shares are exact over time, and
                 largest remainders decide who gives one more now

Nothing is dropped: the short batch at the end of an epoch is kept, or merged into the one before. With `pack`,
`count="examples"` packs the examples of a step into fewer rows (the step, and so its gradient, is that of the padded batch);
`count="rows"` packs the whole epoch and takes `batch` full rows a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from temperament.engine.encoded import AnyEncoded, Encoded, collate, numbered
from temperament.engine.packing import Fill, fill, pack
from temperament.errors import UserError
from temperament.nn.batch import Labelled, Pairs, Tokens
from temperament.nn.draws import permutation

Row = AnyEncoded | list[Encoded]  # one example, or the documents packed into one row


class Stream:
    """Batches of encoded examples. `stream.batch(k)`, also `stream[k]`; `len(stream)` is the number of steps of one epoch."""

    def __init__(
        self,
        examples: Sequence[AnyEncoded],
        batch: int,
        seed: int = 0,
        *,
        pack: int = 0,
        count: Literal["examples", "rows"] = "examples",
        shuffle: bool = True,
        last: Literal["keep", "merge"] = "keep",
        split: bool = False,
        name: str = "data",
        pad: int = 0,
    ):
        if not examples:
            raise UserError("data", name, "there is nothing to train on; give at least one usable row")
        if batch < 1:
            raise UserError("batch", batch, "a step needs at least one row")
        if pack and not all(isinstance(e, Encoded) for e in examples):
            raise UserError("pack", pack, "pairs and judged responses are not packed; leave it out")
        self.name, self.seed, self.shuffle, self.last, self.pad = name, seed, shuffle, last, pad
        self.pack, self.count, self.split, self.size = pack, count, split, batch
        self.examples = [numbered(e, i, name) for i, e in enumerate(examples)]
        if pack:
            too_long = next((e for e in self.examples if len(e) > pack), None)
            if too_long is not None and not split:
                _pack([too_long], pack, split)  # says so, before anything is loaded
        self._epoch = lru_cache(maxsize=2)(self._order)
        self.rows_per_epoch = len(self._epoch(0))
        whole, rest = divmod(self.rows_per_epoch, batch)
        self.steps_per_epoch = max(whole + (rest > 0 and last == "keep"), 1)

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __getitem__(self, step: int) -> Tokens | Pairs | Labelled:
        return self.batch(step)

    def batch(self, step: int, progress=None) -> Tokens | Pairs | Labelled:
        """The whole batch of this step, the same on every process."""
        return assemble(self.rows(step), self._packs_steps, self.pad, self.split)

    def rows(self, step: int) -> list[Row]:
        """What the batch of this step is made of, before it is made."""
        assert step >= 0
        epoch, i = divmod(step, self.steps_per_epoch)
        rows = self._epoch(epoch)
        last = i == self.steps_per_epoch - 1
        return rows[i * self.size : None if last else (i + 1) * self.size]

    def take(self, start: int, count: int) -> list[Row]:
        """Rows [start, start + count) of the endless sequence of epochs, without ends of epochs: what mixtures draw from."""
        out = []
        while len(out) < count:
            epoch, i = divmod(start + len(out), self.rows_per_epoch)
            out += self._epoch(epoch)[i : i + count - len(out)]
        return out

    def steps(self, epochs: float) -> int:
        return round(epochs * self.steps_per_epoch)

    def fill(self) -> Fill | None:
        """How full the rows of the first epoch are; None where nothing is packed."""
        if not self.pack:
            return None
        rows = self._epoch(0)
        if self.count == "examples":
            rows = [row for k in range(len(self)) for row in _pack(self.rows(k), self.pack, self.split)]
        return fill(rows, self.pack)

    @property
    def _packs_steps(self) -> int:
        return self.pack if self.count == "examples" else 0

    @property
    def laid_out(self) -> dict[str, int]:
        """How the rows of a step are made into a batch (what they are padded with is masked, and any token will do)."""
        return {"pack": self._packs_steps, "split_long": bool(self._packs_steps and self.split)}

    def _order(self, epoch: int) -> list[Row]:
        """The rows of one epoch, in order."""
        address = f"data/{self.name}"
        order = lambda n, what: (
            permutation(n, self.seed, f"{address}/{what}", epoch).tolist() if self.shuffle else range(n)
        )
        rows = [self.examples[i] for i in order(len(self.examples), "order")]
        if self.pack and self.count == "rows":  # packing sorts by length; a second permutation undoes that
            packed = _pack(rows, self.pack, self.split)
            rows = [packed[i] for i in order(len(packed), "rows")]
        return rows


_pack = pack


def assemble(rows: list[Row], pack: int = 0, pad: int = 0, split: bool = False) -> Tokens | Pairs | Labelled:
    """The batch of these rows, packed into rows of `pack` tokens if asked."""
    return collate(_pack(rows, pack, split) if pack else rows, pad)


@dataclass(frozen=True)
class Share:
    stream: Stream
    weight: Fraction
    first: int  # number of its first example, so that numbers are unique in the mixture


class Mixture:
    """Several streams in fixed proportions. An epoch ends when each source has been seen whole at least once."""

    def __init__(self, parts: Sequence[tuple[Stream, float]], batch: int):
        if not parts:
            raise UserError("data.mix", [], "name at least one source")
        if any(not 0 < w < float("inf") for _, w in parts):
            raise UserError("data.mix.weights", [w for _, w in parts], "each source needs a weight above 0")
        kinds = {type(s.examples[0]).__name__ for s, _ in parts}
        if len(kinds) > 1:
            raise UserError("data.mix", ", ".join(sorted(kinds)), "the sources give unlike batches; mix rows of one kind")
        names = [s.name for s, _ in parts]
        if len(set(names)) < len(names):
            raise UserError("data.mix", ", ".join(names), "two sources have one name; give each a name of its own")
        for what in ("pack", "split_long"):  # a step is packed whole, whatever source its rows are from
            of = [s.laid_out[what] for s, _ in parts]
            if len(set(of)) > 1:
                said = " and ".join(f"{n}: {v}" for n, v in zip(names, of, strict=True))
                mend = f"its sources differ in {what}, and the rows of a step are laid out together; give all the same"
                raise UserError("data.mix.sources", said, mend + " (pack with count: examples counts)" * (what == "pack"))
        exact = [Fraction(w).limit_denominator(10**6) for _, w in parts]
        if not all(exact):
            raise UserError("data.mix.weights", [w for _, w in parts], "a weight below a millionth is none; raise it")
        first = 0
        self.shares = []
        for (stream, _), w in zip(parts, exact, strict=True):
            self.shares.append(Share(stream, w / sum(exact), first))
            first += len(stream.examples)
        self.size, self.examples = batch, [e for s in self.shares for e in s.stream.examples]
        self.steps_per_epoch = max(-(-s.stream.rows_per_epoch // (s.weight * batch)) for s in self.shares)
        self._given = [[0] * len(self.shares)]  # rows each source has given before step k

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __getitem__(self, step: int) -> Tokens | Pairs | Labelled:
        return self.batch(step)

    def counts(self, step: int) -> list[int]:
        """How many rows of batch `step` come from each source; they add up to the batch."""
        while len(self._given) <= step + 1:
            given, k = self._given[-1], len(self._given)
            due = [max(s.weight * self.size * k - g, Fraction(0)) for s, g in zip(self.shares, given, strict=True)]
            whole = [int(d) for d in due]
            order = sorted(range(len(due)), key=lambda i: (whole[i] - due[i], i))
            for i in order[: max(self.size - sum(whole), 0)]:
                whole[i] += 1
            for i in reversed(order):  # rounding up earlier may leave more due than there is room for: the last give way
                while sum(whole) > self.size and whole[i]:
                    whole[i] -= 1
            self._given.append([g + w for g, w in zip(given, whole, strict=True)])
        return [b - a for a, b in zip(self._given[step], self._given[step + 1], strict=True)]

    def rows(self, step: int) -> list[Row]:
        rows = []
        for share, n, start in zip(self.shares, self.counts(step), self._given[step], strict=True):
            rows += [_moved(row, share.first) for row in share.stream.take(start, n)]
        return rows

    def batch(self, step: int, progress=None) -> Tokens | Pairs | Labelled:
        one = self.shares[0].stream
        return assemble(self.rows(step), one._packs_steps, one.pad, one.split)

    def steps(self, epochs: float) -> int:
        return round(epochs * self.steps_per_epoch)


def mix(parts: Sequence[tuple[Stream, float]], batch: int) -> Mixture:
    """`mix([(stream, weight), ...], batch)`: weights need not add up to one."""
    return Mixture(parts, batch)


def _moved(row: Row, by: int) -> Row:
    if isinstance(row, list):
        return [_moved(d, by) for d in row]
    return numbered(row, row.sides[0].number + by, row.sides[0].source)
