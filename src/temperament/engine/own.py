"""Texts a language model writes itself, from random first tokens: what to look at where no rows are given."""

from __future__ import annotations

import torch
from torch import nn

from temperament.engine.tokens import Sampling, generate
from temperament.nn import draws
from temperament.nn.batch import Tokens


def own_texts(model: nn.Module, rows: int, length: int, seed: int = 0, batch: int = 16) -> list[Tokens]:
    """Batches of texts of a first token and up to `length` more at temperature 1; every token but the first carries weight."""
    vocabulary = model.config.get_text_config().vocab_size
    starts = draws.randint(vocabulary, seed, "own-text", 0, torch.arange(rows)).tolist()
    written = generate(model, [[s] for s in starts], Sampling(max_new=length, temperature=1.0), seed=seed)
    texts = [[s, *ids] for s, ids in zip(starts, written.ids, strict=True)]
    out = []
    for first in range(0, rows, batch):
        some = texts[first : first + batch]
        ids = torch.zeros(len(some), max(map(len, some)), dtype=torch.long)
        segments = torch.full_like(ids, -1)
        for i, t in enumerate(some):
            ids[i, : len(t)], segments[i, : len(t)] = torch.tensor(t), 0
        examples = torch.where(segments >= 0, first + torch.arange(len(some))[:, None], -1)
        weights = (segments >= 0).float()
        weights[:, 0] = 0
        out.append(Tokens(ids, weights, segments, examples))
    return out
