"""Typed batches: what a source yields, an objective prepares, and the loop splits.

A batch is a dataclass whose fields are row-aligned: tensors and lists of `len(batch)` rows, or further batches. Because every
field is aligned, one generic `select` gives splitting into micro-batches, sharding over processes and reordering for all
kinds; no kind writes its own. A field that is not row-aligned has no place in a batch (put it in the objective).

    Tokens      rows of token ids, with a loss weight for each token
    Steps       rows of decisions in a world: what was seen, what was decided
    Pairs       a preferred and a rejected response to one prompt
    Labelled    one response with a desirable / undesirable label
    Rollout     sampled responses or episodes with advantages and the log-probs they were sampled with
    Images      pictures, with what is known of each: its class, its caption
    Captions    captions alone, for what paints the pictures itself
    Chain       steps of denoising, each a decision: what was there, what was made of it

What runs along time (`Tokens`, `Steps`, `Chain`) says itself how likely a model finds it (`logp`) and what a critic may read
of it (`states`), so that an objective of sampled behaviour is one formula for words and for motions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass
class Batch:
    def _map(self, on_tensor, on_list) -> Self:
        new = {}
        for f in fields(self):
            v = getattr(self, f.name)
            if isinstance(v, Batch):
                v = v._map(on_tensor, on_list)
            elif isinstance(v, Tensor):
                v = on_tensor(v)
            elif isinstance(v, list):
                v = on_list(v)
            new[f.name] = v
        return replace(self, **new)

    def __len__(self) -> int:
        v = getattr(self, fields(self)[0].name)
        return len(v)

    def select(self, rows: list[int] | Tensor) -> Self:
        """The batch of these rows, in this order."""
        index = torch.as_tensor(rows, dtype=torch.long)
        return self._map(lambda t: t[index.to(t.device)], lambda x: [x[i] for i in index.tolist()])

    def split(self, size: int) -> Iterator[Self]:
        """Micro-batches of at most `size` rows, in order."""
        if len(self) <= size:  # most batches are one micro-batch: no copy
            if len(self):
                yield self
            return
        for start in range(0, len(self), size):
            yield self.select(range(start, min(start + size, len(self))))

    def shard(self, rank: int, world: int) -> Self:
        """Every `world`-th row from `rank` on: the share of one process. May be empty."""
        if world == 1:
            return self
        return self.select(range(rank, len(self), world))

    def to(self, device: torch.device | str) -> Self:
        return self._map(lambda t: t.to(device, non_blocking=True), lambda x: x)


@dataclass
class Timed(Batch):
    """Rows that run along time: every tensor begins with (rows, T); `weights` (rows, T) says what counts, and how much."""

    @property
    def trained(self) -> float:
        """Sum of the loss weights: the count of a loss averaged over time."""
        return float(self.weights.sum())

    @property
    def mask(self) -> Tensor:
        """(rows, T) bool: true where there is something."""
        return self.weights != 0

    def trim(self) -> Self:
        """Without columns that are padding in every row."""
        length = max(int(self.mask.any(0).nonzero().max()) + 1, 1) if self.mask.any() else 1
        return replace(self, **{f.name: v[:, :length] for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)})

    def per_example(self) -> Self:
        """Weights divided by their sum over each row, so that every row has weight 1 in all."""
        return replace(self, weights=self.weights / self.weights.sum(1, keepdim=True).clamp(min=1e-12))

    def logp(self, model: Any) -> Tensor:
        """(rows, T): log-prob of what was done at each time, nats."""
        raise NotImplementedError

    def states(self, model: Any) -> Tensor:
        """(rows, T, width): what is known before each time, for heads (`nn/heads.py`)."""
        raise NotImplementedError


@dataclass
class Tokens(Timed):
    """ids (rows, T) right-padded; weights (rows, T) float: the loss weight of *predicting* the token at that position (0 on
    prompts and padding; never on the first token of a document). segments (rows, T): -1 on padding, else the number of the
    document inside its row (all 0 when rows are not packed). examples (rows, T): id of the example a token came from, -1 on
    padding; it addresses random draws. extra: per row, whatever the source wants to keep (answers, meta)."""

    ids: Tensor
    weights: Tensor
    segments: Tensor
    examples: Tensor
    extra: list | None = None

    @property
    def mask(self) -> Tensor:
        """(rows, T) bool: true on real tokens."""
        return self.segments >= 0

    @property
    def packed(self) -> bool:
        return bool((self.segments > 0).any())

    @property
    def positions(self) -> Tensor:
        """(rows, T) long: the position of each token in its own document; 0 on padding."""
        t = torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)
        new = torch.ones_like(self.segments, dtype=torch.bool)
        new[:, 1:] = self.segments[:, 1:] != self.segments[:, :-1]
        start = torch.where(new, t, torch.zeros_like(t)).cummax(dim=1).values
        return torch.where(self.mask, t - start, torch.zeros_like(t))

    def logp(self, model: Any) -> Tensor:
        from temperament.nn.logprobs import label, score

        return score(model, self, label())["label"]

    def states(self, model: Any) -> Tensor:
        from temperament.nn.heads import states

        return states(model, self)

    def per_example(self) -> Tokens:
        """Weights divided by their sum over each document, so that every example has weight 1 in all."""
        weights = torch.zeros_like(self.weights)
        for s in range(int(self.segments.max()) + 1):
            inside = self.segments == s
            total = (self.weights * inside).sum(1, keepdim=True)
            weights += torch.where(inside, self.weights / total.clamp(min=1e-12), 0.0) * (total > 0)
        return replace(self, weights=weights)


@dataclass
class Steps(Timed):
    """Decisions in a world (nn/policy.py). observations (rows, T, seen); decisions (rows, T, k): what was decided then, a
    chunk of actions or a correction of the action that was planned; weights (rows, T): 1 while the episode lasts. planned
    (rows, T, acts): the action that was planned for that moment, where decisions correct a plan."""

    observations: Tensor
    decisions: Tensor
    weights: Tensor
    planned: Tensor | None = None

    def logp(self, model: Any) -> Tensor:
        return model(self.observations, self.planned).logp(self.decisions)

    def states(self, model: Any) -> Tensor:
        """What is seen and what is planned, side by side; zeros where nothing is."""
        from temperament.nn.forward import module_of

        planned = self.planned
        if planned is None:
            planned = self.observations.new_zeros(*self.observations.shape[:-1], module_of(model).config.actions)
        return torch.cat([self.observations, planned], -1) * self.mask[..., None]


@dataclass
class Pairs(Batch):
    """ref_chosen, ref_rejected (rows,): log-probs of the responses under the reference, once an objective has prepared them.
    doubt (rows,): probability that a pair is the wrong way round, where the source has one for each."""

    chosen: Tokens
    rejected: Tokens
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    doubt: Tensor | None = None


@dataclass
class Labelled(Batch):
    tokens: Tokens
    label: Tensor  # (rows,) bool: desirable


@dataclass
class Rollout(Batch):
    """tokens: what was sampled, words or decisions; its weights are 1 there (not on prompts, forced or tool tokens, nor
    after an episode's end). behaviour (rows, T): log-prob of each under the policy that sampled it. rewards (rows,), of the
    whole; or (rows, T), as they came. group (rows,): which prompt or start. turn (rows,): which turn of its conversation a
    row is, from 0; None: there is one. Filled in by the objective: advantages (rows, T) or (rows, 1), reference (rows, T):
    log-probs under the reference version; values, returns (rows, T): what a critic said before it is trained, and what it
    should have said."""

    tokens: Timed
    behaviour: Tensor
    rewards: Tensor
    group: Tensor
    advantages: Tensor | None = None
    reference: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    turn: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """(rows,): the reward of the whole row."""
        return self.rewards if self.rewards.dim() == 1 else self.rewards.sum(1)


@dataclass
class Images(Batch):
    """pixels (rows, channels, H, W) in 0..1, of the size the base takes; a model is given them through `engine/pictures.py`.
    examples (rows,): ids, which address random draws. labels (rows,): the class, -1 where there is none. captions: what a
    text-conditioned model reads with it. prior (rows,) bool: made by the base itself, to be kept rather than learnt. Filled in
    by the objective: drawn (rows, ...), what was decided about each picture at random; cost (rows,), what came of it; weights
    (rows,), what each counts in the loss."""

    pixels: Tensor
    examples: Tensor
    labels: Tensor | None = None
    captions: list[str] | None = None
    prior: Tensor | None = None
    drawn: Tensor | None = None
    cost: Tensor | None = None
    weights: Tensor | None = None


@dataclass
class Captions(Batch):
    """examples (rows,): ids, which address random draws. captions: what each row is asked to be. A batch of `Images` has both
    too, so an objective of captions takes either."""

    examples: Tensor
    captions: list[str]
