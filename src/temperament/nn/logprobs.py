"""Log-probabilities of tokens, streamed over the output head: the one primitive of every language loss.

    score(model, tokens, label(), entropy(), kl(reference)) -> {"label": (rows, T), "entropy": (rows, T), "kl": (rows, T)}

The value at position t speaks of the distribution that predicts ids[t]: log p(ids[t] | ids[<t]) for `label`; it is 0 where
tokens.weights is 0. (Values are not multiplied by the weights: a term does that, and counts them.)

Only positions with a weight reach the output head. Up to `chunk` of them go through the model's own forward in one piece;
more are taken chunk by chunk from the captured input of the head and computed again in the backward, so that no more than
chunk x vocabulary logits ever exist. The head is always called as the module it is (tied, wrapped by an adapter); what the
model does to logits afterwards (Gemma's soft cap, the scales of Cohere, Granite, Falcon-H1) is found by comparing with its own
logits at the first call, and where nothing fits the logits are made whole: `Scores.streamed` says so. Softmax is in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from temperament.errors import UserError
from temperament.nn import draws, forward
from temperament.nn.batch import Tokens
from temperament.nn.context import context, current
from temperament.nn.draws import Address
from temperament.nn.forward import Model

SMALL = 1 << 22  # logits (16 MiB in fp32) that are not worth a second pass through the head, however many rows


class Scores(dict[str, Tensor]):
    """What the reducers found, by name. streamed: no more than a chunk of logits existed; else `why` says what prevented it."""

    streamed: bool = True
    why: str = ""


# ---- reducers: from the logits of a chunk to a value for each of its positions ----------------------------------------------


@dataclass
class Slice:
    """n positions. logits (n, V) as the model gives them; labels, examples, positions (n,); side: the reducer's own input
    there; others: the logits of the other models.
    """

    logits: Tensor
    labels: Tensor
    examples: Tensor
    positions: Tensor
    side: Tensor | None = None
    others: dict[int, Tensor] = field(default_factory=dict)
    _logp: Tensor | None = None

    @property
    def logp(self) -> Tensor:
        """(n, V) log-probabilities, fp32; shared by the reducers of one pass."""
        if self._logp is None:
            self._logp = self.logits.log_softmax(-1, dtype=torch.float32)
        return self._logp


class Reducer:
    """Any callable Slice -> (n, ...) (or a dict of those) with a name. side: (rows, T, ...) it wants sliced likewise;
    other: a model whose logits it wants beside (without gradient).
    """

    name: str
    side: Tensor | None = None
    other: Model | None = None

    def __call__(self, s: Slice) -> Tensor | dict[str, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class label(Reducer):
    """log p(ids[t])."""

    name: str = "label"

    def __call__(self, s: Slice) -> Tensor:
        return s.logp.gather(-1, s.labels[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class top(Reducer):
    """log p of given token ids, side (rows, T, K): a cached teacher's best, the letters of a multiple choice."""

    side: Tensor
    name: str = "top"

    def __call__(self, s: Slice) -> Tensor:
        return s.logp.gather(-1, s.side)


@dataclass(frozen=True, eq=False)
class best(Reducer):
    """The k most probable tokens: {name: (.., k) log-probs, name_ids: (.., k) long}; what `top` takes later."""

    k: int
    name: str = "best"

    def __call__(self, s: Slice) -> dict[str, Tensor]:
        values, ids = s.logp.topk(self.k, dim=-1)
        return {self.name: values, self.name + "_ids": ids}


@dataclass(frozen=True, eq=False)
class entropy(Reducer):
    """-sum p log p, in nats."""

    name: str = "entropy"

    def __call__(self, s: Slice) -> Tensor:
        return -(s.logp.exp() * _finite(s.logp)).sum(-1)


@dataclass(frozen=True, eq=False)
class correct(Reducer):
    """1 where ids[t] is the most probable token, else 0."""

    name: str = "correct"

    def __call__(self, s: Slice) -> Tensor:
        return (s.logits.argmax(-1) == s.labels).float()


@dataclass(frozen=True, eq=False)
class sample(Reducer):
    """A token id drawn at each position from the model's distribution there, addressed by (example, position)."""

    seed: int
    step: int = 0
    temperature: float = 1.0
    purpose: str = "score-sample"
    name: str = "sample"

    def __call__(self, s: Slice) -> Tensor:
        u = draws.uniform(self.seed, self.purpose, self.step, s.examples, s.positions)
        return inverse_cdf((s.logits.detach().float() / self.temperature).softmax(-1), u)


@dataclass(frozen=True, eq=False)
class kl(Reducer):
    """Full-vocabulary divergence from another model or version at each position, in nats; gradient to the scored model only.

    forward   KL(other || model) = sum q (log q - log p)    the expectation is the other's: distillation, retention
    reverse   KL(model || other) = sum p (log p - log q)    the expectation is the model's: the penalty of RLHF
    """

    other: Model
    direction: Literal["forward", "reverse"] = "forward"
    temperature: float = 1.0
    name: str = "kl"

    def __call__(self, s: Slice) -> Tensor:
        theirs = s.others[id(self.other)]
        if theirs.shape[-1] != s.logits.shape[-1]:
            mend = f"use a model with the same vocabulary ({theirs.shape[-1]} against {s.logits.shape[-1]} tokens)"
            raise UserError("other", type(forward.module_of(self.other)).__name__, mend)
        tempered = lambda logits: (logits.float() / self.temperature).log_softmax(-1)
        p = s.logp if self.temperature == 1 else tempered(s.logits)
        q = tempered(theirs)
        a, b = (q, p) if self.direction == "forward" else (p, q)
        return (a.exp() * (_finite(a) - _finite(b))).sum(-1)


def inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes u (n,), for each row of probs (n, V): one uniform draw a row, so
    that a row's token depends on nothing but its own numbers. Never a token of probability 0.
    """
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    at = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, at, right=True)[:, 0].clamp_(max=probs.shape[-1] - 1)  # not a number stays in range


def _finite(logp: Tensor) -> Tensor:
    # a token barred from the vocabulary has log p = -inf and p = 0; its share is 0, not 0 * -inf
    return logp.clamp_min(torch.finfo(torch.float32).min)


# ---- the primitive -----------------------------------------------------------------------------------------------------------


def score(
    model: Model,
    tokens: Tokens,
    *reducers: Reducer | type[Reducer],
    given: dict[str, Any] | Tokens | None = None,
    chunk: int = 1024,
) -> Scores:
    """What `reducers` (default: `label`) say about every token that carries weight; see the module.

    given: further model inputs (`forward.inputs`). chunk: positions whose logits exist at once.
    """
    made = [r() if isinstance(r, type) else r for r in reducers] or [label()]
    rows, length = tokens.ids.shape
    at = tokens.weights.reshape(-1).nonzero()[:, 0]
    offset = forward.shift(model)
    if offset and bool((tokens.weights[:, 0] != 0).any()):
        raise UserError("weights[:, 0]", "not 0", "give the first token no weight: nothing before it can predict it")

    others = {id(r.other): r.other for r in made if r.other is not None}
    states = {key: _run(m, tokens, at, given, chunk, keep_graph=False) for key, m in others.items()}
    mine = _run(model, tokens, at, given, chunk, keep_graph=True)

    labels, examples, positions = (x.reshape(-1)[at] for x in (tokens.ids, tokens.examples, tokens.positions))
    sides = [None if r.side is None else r.side.reshape(rows * length, *r.side.shape[2:])[at] for r in made]

    def reduce(part: slice, *tensors: Tensor) -> tuple[Tensor, ...]:
        logits = mine.logits(tensors[0], part)
        with torch.no_grad():
            beside = {key: state.logits(t, part) for (key, state), t in zip(states.items(), tensors[1:], strict=True)}
        s = Slice(logits, labels[part], examples[part], positions[part], others=beside)
        out: dict[str, Tensor] = {}
        for r, side in zip(made, sides, strict=True):
            s.side = None if side is None else side[part]
            value = r(s)
            for name, v in value.items() if isinstance(value, dict) else [(r.name, value)]:
                assert name not in out, f"two reducers are called {name!r}: give one a name"
                out[name] = v
        names[:] = out
        return tuple(out.values())

    names: list[str] = []
    everything = [mine.rows, *(s.rows for s in states.values())]
    straight = all(s.straight for s in (mine, *states.values()))
    size = max(len(at), 1) if straight else chunk
    again = not straight and torch.is_grad_enabled()
    pieces = []
    for start in range(0, max(len(at), 1), size):
        part = slice(start, start + size)
        tensors = [t[part] for t in everything]
        pieces.append(checkpoint(reduce, part, *tensors, use_reentrant=False) if again else reduce(part, *tensors))

    result = Scores()
    for name, values in zip(names, zip(*pieces, strict=True), strict=True):
        values = torch.cat(values) if len(values) > 1 else values[0]
        blank = values.new_zeros(rows * length, *values.shape[1:])
        result[name] = blank.index_copy(0, at, values).view(rows, length, *values.shape[1:])
    result.why = mine.why or next((s.why for s in states.values() if s.why), "")
    result.streamed = not result.why
    return result


def response(model: Model, tokens: Tokens) -> Tensor:
    """(rows,): log-probability of each row's weighted tokens, summed: what preference losses compare. Nats."""
    return (score(model, tokens, label())["label"] * tokens.weights).sum(1)


@dataclass
class _State:
    """rows (n, H): inputs of the head; or (n, V): logits already, if `after` is None. straight: few enough for one piece."""

    model: Model
    rows: Tensor
    straight: bool
    after: Callable[[Tensor], Tensor] | None = None
    why: str = ""
    draws: Address | None = None  # (n,): where the head draws

    def logits(self, rows: Tensor, part: slice) -> Tensor:
        if self.after is None:
            return rows
        with forward.active(self.model), context(draws=_picked(self.draws, part)):
            return self.after(forward.head_of(self.model)(rows[None])[0])


def _run(model: Model, tokens: Tokens, at: Tensor, given: Any, chunk: int, keep_graph: bool) -> _State:
    """One forward of the model, stopped before the head as far as there is more than one piece."""
    with torch.set_grad_enabled(keep_graph and torch.is_grad_enabled()), forward.active(model), _addressed(tokens):
        kwargs = forward.inputs(model, tokens, given)
        index = at - forward.shift(model)
        vocabulary = forward.module_of(model).config.get_text_config().vocab_size
        straight = len(at) <= chunk or len(at) * vocabulary <= SMALL
        head = forward.head_of(model)
        if head is None:
            return _unstreamed(model, tokens, kwargs, index, straight, "the model names no output head")
        address = _picked(current().draws, index)
        catch = _Catch(tokens.ids.shape, index, straight, address)
        hooks = [
            head.register_forward_pre_hook(catch, prepend=True, with_kwargs=True),
            head.register_forward_hook(catch.leave, always_call=True),
        ]
        try:
            seen = model(**kwargs).logits
        finally:
            for hook in hooks:
                hook.remove()
        if catch.rows is None or catch.calls != 1 or seen.shape[:2] != catch.passed.shape[:2]:
            return _unstreamed(model, tokens, kwargs, index, straight, "its output head is not called once on (rows, T, width)")
        if straight:
            return _State(model, seen[0, : len(at)], straight=True)
        after = _after_head(model, head, catch.passed, seen)
        if after is None:
            return _unstreamed(model, tokens, kwargs, index, straight, "it changes its logits in an unknown way")
        return _State(model, catch.rows, straight=False, after=after, draws=address)


def _addressed(tokens: Tokens) -> AbstractContextManager:
    """Any module may see which tokens are real; inside a training step its draws are addressed by their example and
    position."""
    address = current().draws
    if address is not None:
        address = replace(address, examples=tokens.examples, positions=tokens.positions)
    return context(mask=tokens.mask, draws=address)


def _picked(address: Address | None, part: Tensor | slice) -> Address | None:
    """The address of some of its places, in one row."""
    if address is None:
        return None
    examples, positions = (None if x is None else x.reshape(-1)[part][None] for x in (address.examples, address.positions))
    return replace(address, examples=examples, positions=positions)


class _Catch:
    """Hooks of the head: keeps the rows wanted, and lets the model go on with all of them, which draw where they stood, if they
    are few, else with four to compare, at sizes (1 to 64 fold) that tell a soft cap from none.
    """

    def __init__(self, shape: torch.Size, index: Tensor, straight: bool, draws: Address | None):
        self.shape, self.index, self.straight, self.draws = shape, index, straight, draws
        self.rows: Tensor | None = None
        self.calls = 0
        self.inside = ExitStack()

    def __call__(self, head: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self.calls += 1
        hidden = args[0] if args else None
        if hidden is None or hidden.ndim != 3 or hidden.shape[0] != self.shape[0] or hidden.shape[1] < self.shape[1]:
            return None
        hidden = hidden[:, hidden.shape[1] - self.shape[1] :]  # virtual tokens may stand in front
        self.rows = hidden.reshape(-1, hidden.shape[-1])[self.index]
        if not len(self.rows):
            self.passed = hidden[:1, :1]
        elif self.straight:
            self.passed = self.rows[None]
        else:
            few = self.rows[:4].detach()
            self.passed = (few * few.new_tensor([1, 4, 16, 64])[: len(few), None])[None]
        self.inside.enter_context(context(draws=self.draws if self.straight and len(self.rows) else None))
        return (self.passed, *args[1:]), kwargs

    def leave(self, *_: Any) -> None:
        self.inside.close()


def _unstreamed(model: Model, tokens: Tokens, kwargs: dict, index: Tensor, straight: bool, why: str) -> _State:
    logits = model(**kwargs).logits
    logits = logits[:, logits.shape[1] - tokens.ids.shape[1] :]
    return _State(model, logits.reshape(-1, logits.shape[-1])[index], straight, why="" if straight else why)


# ---- what a model does to logits after its head -----------------------------------------------------------------------------

_known: WeakKeyDictionary[nn.Module, Callable] = WeakKeyDictionary()


def _after_head(model: Model, head: nn.Module, passed: Tensor, seen: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The function f with f(head(passed)) = seen, the model's own logits; found once, None if unknown."""
    module = forward.module_of(model)
    if module not in _known:
        with torch.no_grad(), context(draws=None):  # as `seen` was made
            raw = head(passed)
        rtol = 1e-5 if raw.dtype == torch.float32 else 2e-2
        same = lambda f: torch.allclose(f(raw).float(), seen.float(), rtol=rtol, atol=1e-6)
        found = next((f for f in _candidates(module) if same(f)), None)
        if found is None:
            return None
        _known[module] = found
    return _known[module]


def _candidates(module: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    config = module.config.get_text_config()
    value = lambda name: getattr(config, name, None)
    found: list[Callable[[Tensor], Tensor]] = [lambda x: x]
    if cap := value("final_logit_softcapping"):
        found.append(lambda x: torch.tanh(x / cap) * cap)
    for name in ("logit_scale", "lm_head_multiplier"):
        if (scale := value(name)) is not None:
            found.append(lambda x, s=scale: x * s)
    if divisor := value("logits_scaling"):
        found.append(lambda x: x / divisor)
    return found
