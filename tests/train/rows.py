"""Synthetic rows for tests of the loop: a source part whose batches are a pure function of (seed, step), of every kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from temperament.bases.load import Base
from temperament.nn import draws
from temperament.nn.batch import Images, Labelled, Pairs, Rollout, Tokens
from temperament.parts import part
from temperament.run.recipe import Train
from temperament.train.context import Context
from temperament.train.world import World
from tests.models import MODELS, VOCAB

BOS, END, FIRST = 1, 2, 5  # ids of the tiny models: specials first


class Tokenizer:
    """The little that checks ask of a tokenizer."""

    bos_token_id, eos_token_id, chat_template = BOS, END, None


def tokens(rows: int, seed: int, longest: int = 12, vocab: int = VOCAB, first: int = 0, prompts: bool = True) -> Tokens:
    """Rows of unlike length: BOS, a prompt without loss, a response with loss, END."""
    g = draws.generator(seed, "test/rows")
    lengths = torch.randint(5, longest + 1, (rows,), generator=g)
    lengths[0] = longest  # padding is always seen
    ids = torch.randint(FIRST, vocab, (rows, longest), generator=g)
    t = torch.arange(longest).expand(rows, -1)
    mask = t < lengths[:, None]
    ids[:, 0] = BOS
    ids = ids.masked_fill(t == lengths[:, None] - 1, END).masked_fill(~mask, 0)
    start = torch.randint(1, 4, (rows,), generator=g) if prompts else torch.ones(rows, dtype=torch.long)
    weights = (mask & (t >= start[:, None])).float()
    examples = torch.arange(first, first + rows)[:, None].expand(-1, longest).masked_fill(~mask, -1)
    return Tokens(ids, weights, torch.where(mask, 0, -1), examples.clone())


def in_pairs(t: Tokens) -> Tokens:
    """Two documents a row."""
    pad, length = (
        [-1 if k in ("segments", "examples") else 0 for k in ("ids", "weights", "segments", "examples")],
        t.ids.shape[1],
    )
    columns = [
        torch.full((len(t) // 2, 2 * length), p, dtype=getattr(t, k).dtype)
        for p, k in zip(pad, ("ids", "weights", "segments", "examples"), strict=True)
    ]
    for i in range(len(t) // 2 * 2):
        n = int(t.mask[i].sum())
        start = int(t.mask[i - 1].sum()) if i % 2 else 0
        for column, k in zip(columns, ("ids", "weights", "segments", "examples"), strict=True):
            column[i // 2, start : start + n] = i % 2 if k == "segments" else getattr(t, k)[i, :n]
    return Tokens(*columns).trim()


@dataclass
class Stream:
    make: Any
    steps_per_epoch: int = 4

    def batch(self, step: int, progress: Any = None) -> Any:
        return self.make(step)


@part("data.test_rows")
@dataclass(frozen=True)
class Rows:
    """Synthetic rows for tests."""

    kind: str = "Tokens"  # Tokens, Pairs, Labelled, Rollout or Images
    longest: int = 12  # tokens of the longest row
    seed: int = 0  # which rows
    packed: bool = False  # several rows in one

    yields: ClassVar = ("Tokens", "Pairs", "Labelled", "Rollout", "Images")

    def open(self, ctx: Context) -> Stream:
        return Stream(lambda step: self.make(ctx.batch, step))

    def make(self, n: int, step: int) -> Any:
        seed = 1000 * self.seed + step
        if self.kind == "Images":
            pixels = torch.rand(n, 3, 16, 16, generator=draws.generator(seed, "test/pixels"))
            said = [("a red cross at the top left on navy", "a white bar on black")[i % 2] for i in range(n)]
            return Images(pixels, torch.arange(n * step, n * step + n), torch.arange(n) % 4, said, torch.arange(n) % 3 == 0)
        rows = lambda k=0: tokens(n, seed + 500 * k, self.longest, first=n * step)
        if self.kind == "Pairs":
            return Pairs(rows(), rows(1))
        if self.kind == "Labelled":
            return Labelled(rows(), torch.arange(n) % 2 == 0)
        if self.kind == "Rollout":
            one, g = rows(), draws.generator(seed, "test/rollout")
            behaviour = -torch.rand(one.ids.shape, generator=g) * 4 * one.weights
            return Rollout(one, behaviour, torch.rand(n, generator=g), torch.arange(n) // 4)
        return in_pairs(rows()) if self.packed else rows()


def base_of(name: str, seed: int = 0, tokenizer: Any = Tokenizer) -> Base:
    """A tiny random model as a base."""
    return Base(name, {"lm": MODELS[name].build(seed)}, {"tokenizer": tokenizer()} if tokenizer else {})


def spec(**options: Any) -> Train:
    return Train(**{"source": Rows(), "steps": 6, "batch": 4, "micro": 4, **options})


def context(base: Base, **options: Any) -> Context:
    return Context(base, World(), **{"seed": 0, "batch": 4, "micro": 4, **options})
