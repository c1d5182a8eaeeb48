"""What tuning adds to the stream, block by block: every block in both versions at the input that the tuned one sees.

    f_l(x)  what block l adds to its input                        x_{l+1} = x_l + PTC_l + alpha FTC_l
    PTC_l = f_l(x_l) as the pure base has it;   FTC_l = f_l(x_l) as it is now - PTC_l

    PTC, FTC = contributions(base, prompts)     (blocks, prompts, width): at the last token of each prompt, alpha 1
    Scaled(base, alpha)                         the model with FTC scaled, as a view: what `generate` and `score` take

alpha 1 is the tuned model, 0 the base's blocks between the tuned embeddings and head. The two versions are one set of modules,
switched by pointer: a delta that is applied (`base.apply`) is what counts as tuning, whatever its kind. Source: paper 028.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from temperament.errors import UserError
from temperament.nn import forward
from temperament.nn.pieces import Around, Switch, Under, attach
from temperament.nn.places import Block


class _Both(Around):
    """A block that runs twice: as it is, and as the pure base has it."""

    def __init__(self, view: Scaled, block: Block):
        super().__init__()
        self.__dict__.update(view=view, block=block, bare=False)  # the block is called, never owned

    def forward(self, base: Under, *args: Any, **kwargs: Any) -> Any:
        if self.bare:
            return base(*args, **kwargs)
        for cache in (c for c in (*args, *kwargs.values()) if isinstance(c, Cache)):
            if cache.get_seq_length(self.block.depth):  # it holds keys of the one version only
                raise UserError("use_cache", True, "two versions of a block are decoded without a cache; set it to false")
        x = args[0] if args else kwargs["hidden_states"]
        now = base(*args, **kwargs)
        before = _main(self.pure(*args, **kwargs))
        out = self.view.meet(self.block, x, before, _main(now))
        return out if isinstance(now, Tensor) else (out, *now[1:])

    def pure(self, *args: Any, **kwargs: Any) -> Any:
        drop = lambda v: None if isinstance(v, Cache) else v
        self.bare = True
        try:
            with self.view.base.at("base"):
                return self.block.module(*map(drop, args), **{k: drop(v) for k, v in kwargs.items()})
        finally:
            self.bare = False


def _main(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


class Scaled:
    """The base with its applied change, as a view whose every block adds PTC + alpha FTC. Attached only while active."""

    def __init__(self, base: Any, alpha: float):
        self.base, self.alpha, self.switch, self.on = base, alpha, Switch(), False
        if forward.kind(base.model) != "decoder":
            raise UserError("base", base.id, "contributions are defined for decoders, whose blocks share one stream")
        component = next(iter(base.components))
        self.blocks = [b for b in base.places.blocks() if b.component == component]
        self.pieces = [_Both(self, b) for b in self.blocks]

    @property
    def module(self) -> nn.Module:
        return self.base.model

    @contextmanager
    def active(self) -> Iterator[None]:
        if self.on:
            yield
            return
        undo = [attach(p.block.module, p, self.switch) for p in self.pieces]
        self.on = True
        try:
            yield
        finally:
            self.on = False
            for detach in undo:
                detach()

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        with self.active():
            return self.module(*args, **inputs)

    def meet(self, block: Block, x: Tensor, before: Tensor, now: Tensor) -> Tensor:
        """What goes on from a block that was given x."""
        return before if self.alpha == 0 else before + self.alpha * (now - before)


class _Seen(Scaled):
    """The tuned model as it is; what each block adds at the places `at` (rows,) is kept."""

    def __init__(self, base: Any):
        super().__init__(base, 1.0)
        self.at: Tensor = torch.zeros(0)
        self.added: list[tuple[Tensor, Tensor]] = []

    def meet(self, block: Block, x: Tensor, before: Tensor, now: Tensor) -> Tensor:
        last = lambda t: t[torch.arange(len(t), device=t.device), self.at].float()
        self.added.append((last(before) - last(x), last(now) - last(before)))
        return now


@torch.no_grad()
def contributions(base: Any, prompts: Sequence[list[int]], batch: int = 64) -> tuple[Tensor, Tensor]:
    """PTC and FTC (blocks, prompts, width) of the tuned trajectory, at the last token of each prompt."""
    seen, found = _Seen(base), []
    device = forward.device_of(base.model)
    with forward.evaluating(base.model), seen.active():
        for start in range(0, len(prompts), batch):
            rows = list(prompts[start : start + batch])
            longest = max(map(len, rows))  # padded on the right: blocks are causal, so what follows changes nothing
            ids = torch.tensor([r + [0] * (longest - len(r)) for r in rows], device=device)
            seen.at, seen.added = torch.tensor([len(r) - 1 for r in rows], device=device), []
            seen(input_ids=ids, use_cache=False)
            found.append([torch.stack(side) for side in zip(*seen.added, strict=True)])
    return tuple(torch.cat(side, 1).cpu() for side in zip(*found, strict=True))
