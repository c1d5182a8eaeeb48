"""Generation: batched, cached, the same for evaluation, rollouts and decoding methods.

    out = generate(model, prompts, Sampling(max_new=32, temperature=1.0), seed=0, step=3, examples=ids)
    out.ids[i], out.logp[i], out.sampling_logp[i], out.finished[i]

Rows are sorted by length and batched; equal prompts are read once; rows that have ended leave the batch. What a row says
depends on nothing but its prompt and its address: the token at position t of a completion is

    the inverse cumulative distribution at uniform(seed, "sample", step, example, t)

so batch size, order and neighbours change nothing (up to the last bits of a matrix product), and forcing the first tokens of a
completion to what they were gives the same rest.

Several models may go in lockstep, each with its own prompts; *hooks* combine their logits and watch the text. A hook is any
object with some of these methods, called in the order of `hooks`:

    logits(state) -> (rows, V)       the logits to sample from (by default those of the first model)
    on_token(state)                  after each token; `state.force(row, ids)` says what comes next (tool output, a separator),
                                     `state.take({a: b})` that row a goes on as row b stands (particles of one prompt)
    stop(state) -> (rows,) bool      rows to end now
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from temperament.engine.session import Session
from temperament.errors import UserError, WorkFailed
from temperament.nn import draws, forward
from temperament.nn.batch import Tokens
from temperament.nn.forward import Model
from temperament.nn.joint import joint
from temperament.nn.logprobs import inverse_cdf

Finish = Literal["eos", "stop", "length", "hook"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Order of the filters: min_new, temperature, top_k, top_p (as everywhere).

    max_new   tokens to add after a forced prefix
    temperature  0: the most probable token
    min_new   no end token before so many
    stops     token ids, and strings (they need `decode`); what stopped a row stays in its ids
    """

    max_new: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_new: int = 0
    stops: tuple[int | str, ...] = ()

    def __post_init__(self) -> None:
        for name, good, mend in (
            ("max_new", self.max_new >= 1, "give at least 1"),
            ("temperature", self.temperature >= 0, "give 0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "give a share above 0 and up to 1"),
            ("top_k", self.top_k >= 0, "give 0 (all) or more"),
            ("min_new", 0 <= self.min_new <= self.max_new, "give at most max_new"),
        ):
            if not good:
                raise UserError(f"sampling.{name}", getattr(self, name), mend)


@dataclass
class State:
    """What a hook sees. Its rows are those still being written; `rows` are their places in the caller's list, so a hook that
    remembers something of each row files it under those, best in a dict in `scratch`: it goes along where a row takes
    another's place.
    """

    step: int
    rows: list[int]
    examples: Tensor  # (rows,) long
    prompts: list[list[int]]
    logits: dict[str, Tensor]  # (rows, V) of each model, before anything is done to them
    chosen: Tensor  # (rows, V): what the hooks so far have made of them; at first the first model's
    sessions: dict[str, Session]
    scratch: dict[str, Any]
    forced: list[list[int]]
    written: Tensor  # (rows, tokens so far) long, after the forced prefixes
    _queue: dict[int, list[int]]
    _moves: dict[int, int]
    _run: _Run

    @property
    def ids(self) -> list[list[int]]:
        """The completion of each row so far, forced prefix included."""
        return [f + row for f, row in zip(self.forced, self.written.tolist(), strict=True)]

    def force(self, row: int, ids: Sequence[int]) -> None:
        """The next tokens of `row` (an index into this state's rows) shall be these."""
        self._queue.setdefault(self.rows[row], []).extend(ids)

    def everything(self) -> dict[int, list[int]]:
        """The completions so far of all rows of this batch, ended ones too, by their places in the caller's list."""
        return self._run.so_far(self.step)

    def take(self, moves: dict[int, int]) -> None:
        """After this token, row a shall be as row b now is, ended or not: {a: b}, places in the caller's list, of one batch and
        one prompt. What a row draws stays with its place, so equal rows part again."""
        self._moves.update(moves)


class Hook(Protocol):
    """Any of these; none is required."""

    def logits(self, state: State) -> Tensor: ...

    def on_token(self, state: State) -> None: ...

    def stop(self, state: State) -> Tensor: ...


@dataclass
class Generated:
    """One entry a prompt. ids: the completion, forced and end tokens included. sampled: which of them were drawn rather than
    forced. logp: log-prob of each under the first model at temperature 1. sampling_logp: under the distribution it was drawn
    from (0 where there was no choice: forced or greedy). tokens: how many were drawn in all.
    """

    ids: list[list[int]]
    sampled: list[Tensor]
    logp: list[Tensor]
    sampling_logp: list[Tensor]
    finished: list[Finish]
    tokens: int

    def batch(self, prompts: list[list[int]], examples: Sequence[int] | None = None) -> tuple[Tokens, Tensor, Tensor]:
        """Tokens (prompt + completion, weight 1 on what was drawn), and logp and sampling_logp aligned to them, (rows, T)."""
        rows, width = len(prompts), max(len(p) + len(c) for p, c in zip(prompts, self.ids, strict=True))
        ids = torch.zeros(rows, width, dtype=torch.long)
        weights, logp, behaviour = torch.zeros(3, rows, width)
        segments, owner = torch.full((2, rows, width), -1)
        for i, (p, c) in enumerate(zip(prompts, self.ids, strict=True)):
            whole, said = slice(0, len(p) + len(c)), slice(len(p), len(p) + len(c))
            ids[i, whole], segments[i, whole] = torch.tensor(p + c), 0
            owner[i, whole] = i if examples is None else examples[i]
            weights[i, said], logp[i, said], behaviour[i, said] = self.sampled[i].float(), self.logp[i], self.sampling_logp[i]
        return Tokens(ids, weights, segments, owner), logp, behaviour


def end_tokens(model: Model) -> tuple[int, ...]:
    """Every id that ends a text, by the generation config (a list there is common), else by the config."""
    module = forward.module_of(model)
    for config in (getattr(module, "generation_config", None), module.config.get_text_config()):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return ()


def generate(
    model: Model | dict[str, Model],
    prompts: list[list[int]] | dict[str, list[list[int]]],
    sampling: Sampling,
    *,
    seed: int = 0,
    step: int = 0,
    examples: Sequence[int] | None = None,
    forced: list[list[int]] | None = None,
    hooks: Sequence[Hook] = (),
    eos: Sequence[int] | None = None,
    decode: Callable[[list[int]], str] | None = None,
    given: dict[str, Tensor] | Callable[[list[int]], dict[str, Tensor]] | None = None,
    batch: int = 64,
    grad: bool = False,
) -> Generated:
    """Complete each prompt; see the module. With several models the first is the one whose log-probs are kept.

    examples: ids that address the draws (default: 0, 1, ...); samples of one prompt need unequal ones. forced: how each
    completion begins. eos: ids that end a text (default: the model's). given: further inputs (pixels, a source), row-aligned
    tensors or a function from rows to the inputs of those rows. grad: keep the graph, for hooks that differentiate.
    """
    models = model if isinstance(model, dict) else {"model": model}
    texts = prompts if isinstance(prompts, dict) else {name: prompts for name in models}
    if unknown := set(texts) ^ set(models):
        raise UserError("prompts", sorted(unknown), f"give prompts for each of the models {sorted(models)}, and no others")
    count = len(next(iter(texts.values())))
    forced = forced or [[] for _ in range(count)]
    examples = list(range(count)) if examples is None else list(examples)
    for name, value in (("forced", forced), ("examples", examples), *texts.items()):
        if len(value) != count:
            raise UserError(name, f"{len(value)} rows", f"give one for each of the {count} prompts")
    words = tuple(s for s in sampling.stops if isinstance(s, str))
    if words and decode is None:
        raise UserError("sampling.stops", words, "pass `decode` (the tokenizer's), or stop at token ids")
    first = next(iter(models))
    ends = end_tokens(models[first]) if eos is None else tuple(eos)

    order = sorted(range(count), key=lambda i: (-len(texts[first][i]) - len(forced[i]), texts[first][i], i))
    out = Generated([[]] * count, *([None] * count for _ in range(4)), tokens=0)
    with ExitStack() as stack:
        for m in models.values():
            stack.enter_context(forward.evaluating(forward.module_of(m)))
        if not grad:
            stack.enter_context(torch.no_grad())
            for m in models.values():
                stack.enter_context(joint(m))
        for start in range(0, count, batch):
            rows = order[start : start + batch]
            pick = lambda values, rows=rows: [values[i] for i in rows]
            more = given(rows) if callable(given) else {k: v[rows] for k, v in (given or {}).items()}
            chosen = {name: pick(t) for name, t in texts.items()}
            run = _Run(models, chosen, pick(forced), rows, pick(examples), sampling, ends, more, grad)
            run.loop(seed, step, hooks, words, decode)
            run.file(out)
    return out


class _Run:
    """One batch on its way. Tables (n, max_new) hold what was written after the forced prefixes; `live` are the rows of them
    that are still in the sessions, `running` those whose text is not complete.
    """

    def __init__(self, models, prompts, forced, rows, examples, sampling, ends, given, grad):
        self.sampling, self.rows, self.prompts, self.forced = sampling, rows, prompts, forced
        self.first = next(iter(models))
        self.device = forward.device_of(models[self.first])
        self.examples = self._long(examples)
        self.eos = frozenset(ends)
        self.ends = self._long([*ends, *(s for s in sampling.stops if isinstance(s, int))])
        longest = max(map(len, forced))
        self.sessions = {}
        for name, model in models.items():
            texts = [p + f for p, f in zip(prompts[name], forced, strict=True)]
            place = {t: i for i, t in enumerate(dict.fromkeys(map(tuple, texts)))}
            once = len(place) < len(texts) and not given  # equal prompts are read once
            keep = longest + 1 if name == self.first else 1
            read = [list(t) for t in place] if once else texts
            s = Session(model, read, room=sampling.max_new, given=given, keep=keep, grad=grad)
            self.sessions[name] = s.select([place[tuple(t)] for t in texts]) if once else s

        shape = len(rows), sampling.max_new
        self.written = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.drawn = torch.ones(shape, dtype=torch.bool, device=self.device)
        self.logp, self.sampling_logp = torch.zeros(2, *shape, device=self.device)
        self.lengths = [sampling.max_new] * len(rows)
        self.finished: list[Finish] = ["length"] * len(rows)
        self.live = torch.arange(len(rows), device=self.device)
        self.running = torch.ones(len(rows), dtype=torch.bool, device=self.device)
        self.forced_logp = self._forced_logp() if longest else [torch.zeros(0)] * len(rows)

    def _long(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def _forced_logp(self) -> list[Tensor]:
        """The log-probs of the forced tokens, from the logits of the prefill."""
        logp = self.sessions[self.first].tail.log_softmax(-1, dtype=torch.float32).detach()
        at = [slice(-len(f) - 1, -1) for f in self.forced]
        return [logp[i, at[i]].gather(-1, self._long(f)[:, None])[:, 0].cpu() for i, f in enumerate(self.forced)]

    def loop(self, seed: int, step: int, hooks: Sequence[Hook], words: tuple[str, ...], decode) -> None:
        with_logits, with_token, with_stop = ([h for h in hooks if hasattr(h, m)] for m in ("logits", "on_token", "stop"))
        sampling, state = self.sampling, None
        scratch: dict[str, Any] = {}
        queue: dict[int, list[int]] = {}
        moves: dict[int, int] = {}
        if sampling.temperature > 0:
            places = self._long([len(f) for f in self.forced])[:, None] + torch.arange(sampling.max_new, device=self.device)
            uniforms = draws.uniform(seed, "sample", step, self.examples[:, None], places)

        for t in range(sampling.max_new):
            live = self.live
            logits = {name: s.logits for name, s in self.sessions.items()}
            mine = used = logits[self.first]
            if hooks:
                state = self._state(t, logits, scratch, queue, moves)
                for h in with_logits:
                    used = state.chosen = h.logits(state)
            logp = mine.log_softmax(-1, dtype=torch.float32)
            barred = self.ends if t < sampling.min_new and len(self.ends) else None
            u = uniforms[live, t] if sampling.temperature > 0 else None
            tokens, sampling_logp = choose(used, sampling, u, barred, logp if used is mine else None)
            if queue:
                tokens, drawn = self._take(queue, tokens)
                sampling_logp, self.drawn[live, t] = sampling_logp * drawn, drawn
            self.written[live, t] = tokens
            self.logp[live, t] = logp.gather(-1, tokens[:, None])[:, 0].detach()
            self.sampling_logp[live, t] = sampling_logp.detach()

            if len(self.ends):
                self._end(torch.isin(tokens, self.ends), t, None)
            if words:
                self._end(self._said(words, decode, t), t, "stop")
            if state is not None:
                state.written = self.written[live, : t + 1]
                for h in with_token:
                    h.on_token(state)
                for h in with_stop:
                    self._end(torch.as_tensor(h.stop(state), device=self.device), t, "hook")
                if moves:
                    self._move(moves, scratch, queue)
                    live = self.live
                    tokens = self.written[live, t]
            running = self.running[live]
            left = int(running.sum())
            if left == 0 or t + 1 == sampling.max_new:
                break
            # dropping a row copies all others' keys and values, about the price of a step; hooks see running rows only
            if left <= 0.75 * len(live) or (hooks and left < len(live)):
                kept = running.nonzero()[:, 0]
                self.live, tokens = live[kept], tokens[kept]
                for s in self.sessions.values():
                    s.select(kept)
            for s in self.sessions.values():
                s.step(tokens)

    def _state(self, t: int, logits: dict[str, Tensor], scratch: dict[str, Any], queue: dict, moves: dict) -> State:
        here = self.live.tolist()
        pick = lambda values: [values[i] for i in here]
        return State(t, pick(self.rows), self.examples[self.live], pick(self.prompts[self.first]), logits, logits[self.first],
                     self.sessions, scratch, pick(self.forced), self.written[self.live, :t], queue, moves, self)

    def _take(self, queue: dict[int, list[int]], tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens with those that a hook has forced in their place, and which of them were drawn."""
        tokens, drawn = tokens.clone(), torch.ones_like(tokens, dtype=torch.bool)
        for at, i in enumerate(self.live.tolist()):
            if waiting := queue.get(self.rows[i]):
                tokens[at], drawn[at] = waiting.pop(0), False
        for row in [row for row, waiting in queue.items() if not waiting]:
            del queue[row]
        return tokens, drawn

    def so_far(self, t: int) -> dict[int, list[int]]:
        lengths = [t + 1 if bool(go) else n for go, n in zip(self.running, self.lengths, strict=True)]
        return {row: self.forced[i] + self.written[i, : lengths[i]].tolist() for i, row in enumerate(self.rows)}

    def _move(self, moves: dict[int, int], scratch: dict[str, Any], queue: dict[int, list[int]]) -> None:
        """Rows take others' places, all at once: tables, sessions and what hooks remember; an ended row may go on again."""
        place = {row: i for i, row in enumerate(self.rows)}
        source = self._long([place[moves.get(row, row)] for row in self.rows])
        at = {i: k for k, i in enumerate(self.live.tolist())}
        for name in ("written", "drawn", "logp", "sampling_logp", "running"):
            setattr(self, name, getattr(self, name)[source])
        for name in ("lengths", "finished", "forced", "forced_logp"):
            setattr(self, name, [getattr(self, name)[i] for i in source.tolist()])
        self.live = self.running.nonzero()[:, 0]
        for s in self.sessions.values():
            s.select([at[i] for i in source[self.live].tolist()])
        for known in (queue, *(v for v in scratch.values() if isinstance(v, dict))):
            taken = {a: copy.copy(known[b]) for a, b in moves.items() if b in known}
            for a in moves:
                known.pop(a, None)
            known.update(taken)
        moves.clear()

    def _end(self, over: Tensor, t: int, reason: Finish | None) -> None:
        """These of the live rows are complete with the token of step t; with no reason given, the token says which."""
        over = over & self.running[self.live]
        if bool(over.any()):
            for i in self.live[over].tolist():
                self.running[i] = False
                self.finished[i] = reason or ("eos" if int(self.written[i, t]) in self.eos else "stop")
                self.lengths[i] = t + 1

    def _said(self, words: tuple[str, ...], decode: Callable[[list[int]], str], t: int) -> Tensor:
        """Rows whose newest tokens complete one of the words (a character may take four tokens)."""
        first = max(0, t - 4 * max(map(len, words)) - 4)
        texts = [decode(row) for row in self.written[self.live, first : t + 1].tolist()]
        return torch.tensor([any(w in text for w in words) for text in texts], device=self.device)

    def file(self, out: Generated) -> None:
        """Put the rows where the caller has them."""
        written, drawn, logp, sampling_logp = (x.cpu() for x in (self.written, self.drawn, self.logp, self.sampling_logp))
        for at, i in enumerate(self.rows):
            n, forced = self.lengths[at], self.forced[at]
            none = torch.zeros(len(forced))
            out.ids[i] = forced + written[at, :n].tolist()
            out.sampled[i] = torch.cat([none.bool(), drawn[at, :n]])
            out.logp[i] = torch.cat([self.forced_logp[at], logp[at, :n]])
            out.sampling_logp[i] = torch.cat([none, sampling_logp[at, :n]])
            out.finished[i] = self.finished[at]
            out.tokens += int(drawn[at, :n].sum())
            if not (out.logp[i].isfinite().all() and out.sampling_logp[i].isfinite().all()):
                raise WorkFailed("the model's logits are not finite: nothing can be sampled from them")


def choose(
    logits: Tensor, sampling: Sampling, u: Tensor | None, barred: Tensor | None = None, logp: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A token for each row of logits (rows, V) and its log-prob under the filtered distribution; u (rows,) uniform in [0, 1).

    barred: ids that may not come. logp: log-softmax of the logits, if it is at hand.
    """
    if barred is not None:
        logits, logp = logits.index_fill(-1, barred, -torch.inf), None
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros_like(tokens, dtype=torch.float32)
    if logp is None or sampling.temperature != 1 or sampling.top_k or sampling.top_p < 1:
        kept = logits.float() / sampling.temperature
        if 0 < sampling.top_k < kept.shape[-1]:
            kept = kept.masked_fill(kept < kept.topk(sampling.top_k, -1).values[:, -1:], -torch.inf)
        if sampling.top_p < 1:
            ordered, at = kept.sort(dim=-1, descending=True, stable=True)
            before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
            before[:, 0] = 0  # the mass of all more probable tokens: a token stays while that is below top_p
            kept = torch.full_like(kept, -torch.inf).scatter(-1, at, ordered.masked_fill(before >= sampling.top_p, -torch.inf))
        logp = kept.log_softmax(-1)
    tokens = inverse_cdf(logp.exp(), u)
    return tokens, logp.gather(-1, tokens[:, None])[:, 0]
