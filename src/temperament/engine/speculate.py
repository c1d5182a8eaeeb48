"""Speculative decoding that says exactly what decoding without it says: a draft runs ahead, the whole is asked once for many
tokens.

    out = speculate(models, prompts, sampling, draft="tuned", ahead=4, combine=f, seed=0)      as `tokens.generate`

The token at position t is the inverse cumulative distribution of f(logits) at uniform(seed, "sample", step, example, t), as
everywhere. The draft guesses it with the *same* uniform under its own distribution; the other models then read the guesses in
one pass; guesses are kept as far as they are what f says, and the first that is not is replaced by what f says. So no token
depends on the draft - the draws are coupled, and samples are not only equal in distribution but equal (up to the last bits of a
matrix product, which may differ between one pass and many). A guess is right with probability at least 1 - 2 TV for the order
of the vocabulary at hand, and always where both are certain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from temperament.engine.session import Session
from temperament.engine.tokens import Generated, Sampling, choose, end_tokens
from temperament.errors import UserError
from temperament.nn import draws, forward
from temperament.nn.forward import Model

Combine = Callable[[dict[str, Tensor]], Tensor]


@torch.no_grad()
def speculate(
    models: dict[str, Model],
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    draft: str,
    ahead: int,
    combine: Combine,
    seed: int = 0,
    step: int = 0,
    examples: Sequence[int] | None = None,
    hooks: Sequence[Any] = (),
    eos: Sequence[int] | None = None,
    batch: int = 64,
) -> Generated:
    """combine: logits by model, each (rows, V), to those that are sampled from; a pure function. See the module."""
    if hooks or sampling.stops or sampling.min_new:
        raise UserError(
            "inference",
            [type(h).__name__ for h in hooks] or sampling,
            "decoding that runs ahead knows no other hooks, stops or min_new; set draft: 0",
        )
    first = next(iter(models))
    ends = end_tokens(models[first]) if eos is None else tuple(eos)
    examples = list(range(len(prompts))) if examples is None else list(examples)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i], i))
    out = Generated([[]] * len(prompts), *([None] * len(prompts) for _ in range(4)), tokens=0)
    with ExitStack() as stack:
        for m in models.values():
            stack.enter_context(forward.evaluating(forward.module_of(m)))
        for start in range(0, len(prompts), batch):
            rows = order[start : start + batch]
            _Run(
                models, [prompts[i] for i in rows], rows, [examples[i] for i in rows], sampling, ends, draft, ahead, combine
            ).go(seed, step, out)
    return out


class _Run:
    """One batch. Sessions hold everything written but the newest token, `pending`."""

    def __init__(self, models, prompts, rows, examples, sampling, ends, draft, ahead, combine):
        self.first, self.draft, self.ahead, self.combine = next(iter(models)), draft, ahead, combine
        self.sampling, self.ends = sampling, frozenset(ends)
        self.device = forward.device_of(models[self.first])
        self.rows = list(rows)
        self.examples = torch.tensor(examples, device=self.device)
        self.sessions = {n: Session(m, prompts, room=sampling.max_new + ahead + 1) for n, m in models.items()}
        self.ids: list[list[int]] = [[] for _ in rows]
        self.logp: list[list[float]] = [[] for _ in rows]
        self.sampling_logp: list[list[float]] = [[] for _ in rows]

    def go(self, seed: int, step: int, out: Generated) -> None:
        places = torch.arange(self.sampling.max_new + self.ahead + 1, device=self.device)
        self.uniforms = draws.uniform(seed, "sample", step, self.examples[:, None], places)
        self.take({n: s.logits[:, None] for n, s in self.sessions.items()}, None)
        self.drop(out)
        while self.rows:
            pending = torch.tensor([ids[-1] for ids in self.ids], device=self.device)
            guesses, seen = [], [self.sessions[self.draft].step(pending)]
            for j in range(self.ahead):
                guesses.append(choose(seen[-1], self.sampling, self.uniform(j))[0])
                seen.append(self.sessions[self.draft].step(guesses[-1]))
            block = torch.stack([pending, *guesses], 1)
            logits = {n: torch.stack(seen, 1) if n == self.draft else s.read(block) for n, s in self.sessions.items()}
            kept = self.take(logits, torch.stack(guesses, 1))
            for s in self.sessions.values():
                s.forget([self.ahead - n for n in kept])
            self.drop(out)

    def uniform(self, j: int) -> Tensor | None:
        at = torch.tensor([len(ids) + j for ids in self.ids], device=self.device)
        return self.uniforms.gather(1, at[:, None])[:, 0] if self.sampling.temperature > 0 else None

    def take(self, logits: dict[str, Tensor], guesses: Tensor | None) -> list[int]:
        """Write what the combined logits (rows, n, V) say as far as the guesses (rows, n - 1) were right, and one more; how
        many were."""
        n = next(iter(logits.values())).shape[1]
        found = [
            choose(self.combine({m: x[:, j] for m, x in logits.items()}), self.sampling, self.uniform(j)) for j in range(n)
        ]
        tokens, drawn = (torch.stack(x, 1) for x in zip(*found, strict=True))
        logp = logits[self.first].log_softmax(-1, dtype=torch.float32).gather(-1, tokens[..., None])[..., 0]
        right = [0] * len(self.rows) if guesses is None else (tokens[:, :-1] == guesses).long().cumprod(1).sum(1).tolist()
        for i, k in enumerate(right):
            for written, new in ((self.ids, tokens), (self.logp, logp), (self.sampling_logp, drawn)):
                written[i] += new[i, : k + 1].tolist()
        return right

    def drop(self, out: Generated) -> None:
        """File the rows that are complete; go on with the others."""
        left = []
        for i, ids in enumerate(self.ids):
            end = next((t + 1 for t, x in enumerate(ids) if x in self.ends), None)
            n = min(end or self.sampling.max_new, self.sampling.max_new)
            if end is None and len(ids) < self.sampling.max_new:
                left.append(i)
                continue
            row = self.rows[i]
            out.ids[row], out.sampled[row] = ids[:n], torch.ones(n, dtype=torch.bool)
            out.logp[row], out.sampling_logp[row] = torch.tensor(self.logp[i][:n]), torch.tensor(self.sampling_logp[i][:n])
            out.finished[row] = "eos" if end is not None and end <= self.sampling.max_new else "length"
            out.tokens += n
        if len(left) < len(self.rows):
            self.rows, self.ids, self.logp, self.sampling_logp = (
                [x[i] for i in left] for x in (self.rows, self.ids, self.logp, self.sampling_logp)
            )
            if left:
                self.uniforms = self.uniforms[left]
                for s in self.sessions.values():
                    s.select(left)
