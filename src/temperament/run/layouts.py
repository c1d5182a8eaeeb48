"""The same rows, laid out otherwise: what must not change a gradient. Any kind of batch; fields aligned with
the columns of its tokens (log-probs of a rollout) go with them, and so do those of steps in a world.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from temperament.nn.batch import Batch, Timed, Tokens


def token_fields(batch: Batch) -> list[Tokens]:
    return (
        [batch] if isinstance(batch, Tokens) else [v for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tokens)]
    )


def few(batch: Batch, n: int = 4) -> Batch:
    """At most n rows of unlike length, none from the longer half: enough to see any law, cheap for any model."""
    tokens = token_fields(batch)
    if not tokens or len(batch) <= 1:
        return batch.select(range(min(n, len(batch))))
    order = sum(t.mask.sum(1) for t in tokens).argsort(stable=True)
    half = max(len(order) // 2, min(n, len(order)))
    rows = sorted({round(i * (half - 1) / max(n - 1, 1)) for i in range(n)})
    return trimmed(batch.select(order[rows]))


def trimmed(batch: Batch) -> Batch:
    """Without columns that are padding in every row, also in what is aligned with them."""
    return _columns(batch, lambda t: t.trim().weights.shape[1] - t.weights.shape[1])


def padded(batch: Batch, more: int) -> Batch:
    """With `more` columns of padding on the right, filled with ids that are not padding."""
    return _columns(batch, lambda t: more)


def _columns(batch: Batch, change: Callable[[Timed], int]) -> Batch:
    new: dict[str, Any] = {}
    own = [batch] if isinstance(batch, Timed) else []
    for f in fields(batch):
        v = getattr(batch, f.name)
        if isinstance(v, Batch):
            new[f.name] = _columns(v, change)
            own += [v] if isinstance(v, Timed) else []
    if own:
        length, by = own[0].weights.shape[1], change(own[0])
        for f in fields(batch):
            v = getattr(batch, f.name)
            if isinstance(v, Tensor) and v.dim() > 1 and v.shape[1] == length and length > 1:
                new[f.name] = (
                    v[:, : length + by]
                    if by <= 0
                    else _filled(v, by, {"segments": -1, "examples": -1}.get(f.name, 0), f.name == "ids")
                )
    return replace(batch, **new)


def _filled(v: Tensor, by: int, value: int, with_ids: bool) -> Tensor:
    more = v[:, :1].expand(-1, by) if with_ids else v.new_full((len(v), by, *v.shape[2:]), value)
    return torch.cat([v, more], 1)


def documents(tokens: Tokens) -> list[dict[str, Tensor]]:
    """Every document of every row, with its own columns."""
    found = []
    for i in range(len(tokens)):
        for s in range(int(tokens.segments[i].max()) + 1):
            at = tokens.segments[i] == s
            if at.any():
                found.append({k: getattr(tokens, k)[i][at] for k in ("ids", "weights", "examples")})
    return found


def repacked(tokens: Tokens) -> Tokens:
    """Packed rows with one document a row; others all in one row."""
    docs = documents(tokens)
    rows = [[d] for d in docs] if tokens.packed else [docs]
    length = max(sum(len(d["ids"]) for d in row) for row in rows)
    out = {
        k: torch.full((len(rows), length), fill, dtype=getattr(tokens, k).dtype)
        for k, fill in (("ids", 0), ("weights", 0), ("segments", -1), ("examples", -1))
    }
    for i, row in enumerate(rows):
        start = 0
        for s, d in enumerate(row):
            here = slice(start, start := start + len(d["ids"]))
            out["segments"][i, here] = s
            for k, v in d.items():
                out[k][i, here] = v
    return Tokens(**out)


def room(model: nn.Module, batch: Batch, wish: int) -> int:
    """How many of `wish` further columns the model has positions for."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    length = max((t.ids.shape[1] for t in token_fields(batch)), default=0)
    return wish if not isinstance(limit, int) or limit <= 0 else max(min(wish, limit - length), 0)
