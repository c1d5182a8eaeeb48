"""Encoded documents, and batches of them.

    Encoded         one document: ids, and the loss weight of each
    EncodedPair     a preferred and a rejected response     -> Pairs
    EncodedLabel    a response with its label               -> Labelled
    EncodedPrompt   ids up to an answer to come, and what rewards want to know
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from temperament.engine.examples import NOWHERE, Origin
from temperament.nn.batch import Labelled, Pairs, Tokens


@dataclass(frozen=True)
class Encoded:
    """One document. roles: (start, end, role) of runs of tokens, for display. cut: tokens truncated. border: a token straddles
    the border of prompt and response. number: its id in the data set, which addresses random draws; source: which set."""

    ids: list[int]
    weights: list[float]
    roles: tuple[tuple[int, int, str], ...] = ()
    origin: Origin = NOWHERE
    meta: dict = field(default_factory=dict)
    cut: int = 0
    border: bool = False
    number: int = 0
    source: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained(self) -> float:
        return float(sum(self.weights))

    @property
    def split(self) -> tuple[list[int], list[int]]:
        """(ids before the first trained token, ids from it to the last trained one): a question and its expected answer with
        its end token, as generation would be asked and as it should answer."""
        at = [t for t, w in enumerate(self.weights) if w > 0]
        return (self.ids[: at[0]], self.ids[at[0] : at[-1] + 1]) if at else (self.ids, [])

    @property
    def sides(self) -> tuple[Encoded, ...]:
        return (self,)


@dataclass(frozen=True)
class EncodedPair:
    chosen: Encoded
    rejected: Encoded

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))

    @property
    def origin(self) -> Origin:
        return self.chosen.origin

    @property
    def sides(self) -> tuple[Encoded, ...]:
        return (self.chosen, self.rejected)


@dataclass(frozen=True)
class EncodedLabel:
    tokens: Encoded
    label: bool

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def origin(self) -> Origin:
        return self.tokens.origin

    @property
    def sides(self) -> tuple[Encoded, ...]:
        return (self.tokens,)


@dataclass(frozen=True)
class EncodedPrompt(Encoded):
    """Ids up to the header of an answer to come; nothing is trained. `meta` goes to the rewards; `prompt` is what was asked."""

    prompt: str | list = ""


AnyEncoded = Encoded | EncodedPair | EncodedLabel


def numbered(one: AnyEncoded, number: int, source: str = "") -> AnyEncoded:
    """With this id, of this source. The two sides of a pair share it: draws of one pair are the same for both."""
    mark = lambda d: replace(d, number=number, source=source)
    if isinstance(one, EncodedPair):
        return EncodedPair(mark(one.chosen), mark(one.rejected))
    if isinstance(one, EncodedLabel):
        return replace(one, tokens=mark(one.tokens))
    return mark(one)


def collate(rows: Sequence[AnyEncoded | Sequence[Encoded]], pad: int = 0) -> Tokens | Pairs | Labelled:
    """A batch of these rows, padded on the right. A row is one document or, packed, a list of several. Padding has segment -1
    and weight 0: `pad` is never seen nor trained, also where it is the end token. `extra`: {"source", "origin", "meta"}."""
    if rows and isinstance(rows[0], EncodedPair):
        return Pairs(collate([r.chosen for r in rows], pad), collate([r.rejected for r in rows], pad))
    if rows and isinstance(rows[0], EncodedLabel):
        return Labelled(collate([r.tokens for r in rows], pad), torch.tensor([r.label for r in rows]))
    packed = [[r] if isinstance(r, Encoded) else list(r) for r in rows]
    width = max([1, *(sum(len(d) for d in row) for row in packed)])
    columns = zip(*(_columns(row, width, pad) for row in packed), strict=True) if packed else ([], [], [], [])
    made = [
        torch.tensor(c, dtype=t).reshape(-1, width)
        for c, t in zip(columns, (torch.long, torch.float, torch.long, torch.long), strict=True)
    ]
    extra = [_extra(r) if isinstance(r, Encoded) else [_extra(d) for d in r] for r in rows]
    return Tokens(*made, extra)


def _columns(row: Sequence[Encoded], width: int, pad: int) -> tuple[list, list, list, list]:
    """ids, weights, segments and examples of one row, padded to `width`."""
    ids, weights, segments, examples = [], [], [], []
    for segment, d in enumerate(row):
        ids += d.ids
        weights += [0.0, *d.weights[1:]][: len(d)]  # nothing predicts the first token of a document
        segments += [segment] * len(d)
        examples += [d.number] * len(d)
    rest = width - len(ids)
    return ids + [pad] * rest, weights + [0.0] * rest, segments + [-1] * rest, examples + [-1] * rest


def _extra(d: Encoded) -> dict:
    extra = {"source": d.source, "origin": str(d.origin), "meta": d.meta}
    return {**extra, "prompt": d.prompt} if isinstance(d, EncodedPrompt) else extra
