"""What is known during one forward, for any module that asks: mask, example ids, task, time step, conditions, side streams.

    with context(ids=batch.examples, time=t, conditions={"style": s}, draws=Address(seed, step)):
        model(...)                               # inside: current().time, current().need("style")

The value lives in a context variable, so it needs no arguments through foreign model code, nests, and is the same in a worker
thread that enters it. Gradient checkpointing recomputes a block during backward, after the `with` has ended (on a GPU in
another thread): give the checkpoint `context_fn=carry`, as `checkpointing(model)` does, and recomputation sees what the
forward saw - streams and call counts as they were on entry of the block, and the taps, patches and attention edits of that
moment.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from temperament.errors import UserError
from temperament.nn.draws import Address


class Intervention:
    """Something attached to a model while a context is active: once, however often it is entered; removed with the last."""

    _entered = 0

    def attach(self) -> None:
        raise NotImplementedError

    def detach(self) -> None:
        raise NotImplementedError

    def _enter(self) -> None:
        if self._entered == 0:
            self.attach()
        self._entered += 1

    def _leave(self) -> None:
        self._entered -= 1
        if self._entered == 0:
            self.detach()


@dataclass(frozen=True)
class Context:
    """One forward. Row-aligned: `mask` (rows, ...), `ids`, `task` and the tensors of `conditions`."""

    mask: Tensor | None = None
    ids: Any = None
    task: Any = None
    time: Tensor | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)
    streams: dict[str, Any] = field(default_factory=dict)  # handed from block to block: the one thing modules may write
    draws: Address | None = None
    active: tuple[Intervention, ...] = ()
    calls: dict[tuple[int, str], int] = field(default_factory=dict)

    def need(self, name: str) -> Any:
        """The field or condition `name`. UserError when the forward runs without it."""
        value = getattr(self, name) if name in FIELDS else self.conditions.get(name)
        if value is None:
            how = f"{name}=..." if name in FIELDS else f"conditions={{{name!r}: ...}}"
            raise UserError(f"context.{name}", None, f"a part of this model reads it; run inside `with context({how})`")
        return value

    def rows(self, index: Tensor) -> Context:
        """The context of these rows (a micro-batch, a reordered beam)."""

        def pick(value):
            if isinstance(value, Tensor):
                return value[index.to(value.device)] if value.dim() else value
            return [value[i] for i in index.tolist()] if isinstance(value, list) else value

        return replace(self, mask=pick(self.mask), ids=pick(self.ids), task=pick(self.task), time=pick(self.time),
                       conditions={k: pick(v) for k, v in self.conditions.items()})

    def snapshot(self) -> Context:
        """As it is now: what a module writes later does not reach it."""
        return replace(self, streams=dict(self.streams), calls=dict(self.calls))

    def count(self, key: tuple[int, str]) -> int:
        """The number of this call, from 0, of one intervention at one place; counted anew in every outermost `with`."""
        number = self.calls.get(key, 0)
        self.calls[key] = number + 1
        return number


FIELDS = tuple(f.name for f in fields(Context) if f.name not in ("active", "calls"))
_NOTHING = Context()
_CURRENT: ContextVar[Context] = ContextVar("temperament.context", default=_NOTHING)


def current() -> Context:
    """The context of the forward now running; outside of any, one without values."""
    return _CURRENT.get()


@contextmanager
def using(value: Context) -> Iterator[Context]:
    """Run under exactly this context, its interventions attached."""
    token = _CURRENT.set(value)
    entered = []
    try:
        for intervention in value.active:
            intervention._enter()
            entered.append(intervention)
        yield value
    finally:
        for intervention in reversed(entered):
            intervention._leave()
        _CURRENT.reset(token)


def context(**values: Any) -> AbstractContextManager[Context]:
    """A context with these values; what is not given is taken from the one around it, conditions one by one."""
    unknown = set(values) - set(FIELDS)
    if unknown:
        name = sorted(unknown)[0]
        raise UserError("context", name, f"known: {', '.join(FIELDS)}; anything else goes into conditions={{{name!r}: ...}}")
    outer = current()
    if "conditions" in values:
        values["conditions"] = {**outer.conditions, **values["conditions"]}
    return using(replace(_own(outer), **values))


def intervening(intervention: Intervention) -> AbstractContextManager[Context]:
    """The present context with one more intervention, innermost."""
    outer = _own(current())
    return using(replace(outer, active=(*outer.active, intervention)))


def _own(outer: Context) -> Context:
    """The outer context, or a fresh one outside of any (the default is shared and must stay empty)."""
    return Context() if outer is _NOTHING else outer


# --- gradient checkpointing ------------------------------------------------------------------------------------------------


def carry() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The `context_fn` of torch.utils.checkpoint (use_reentrant=False): recompute under the context of the forward."""
    now = current()
    return nullcontext(), (nullcontext() if now is _NOTHING else using(now.snapshot()))


checkpoint: Callable[..., Any] = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, context_fn=carry)


def checkpointing(model: nn.Module, enabled: bool = True) -> None:
    """Switch gradient checkpointing on, so that recomputation carries the context (transformers and diffusers models)."""
    able = getattr(model, "supports_gradient_checkpointing", getattr(model, "_supports_gradient_checkpointing", True))
    if enabled and not able:
        raise UserError("gradient_checkpointing", type(model).__name__, "this architecture cannot checkpoint; leave it off")
    if not able:
        return
    if not enabled:
        for name in ("gradient_checkpointing_disable", "disable_gradient_checkpointing"):
            if hasattr(model, name):
                getattr(model, name)()
    elif hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": carry})
    elif hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing(gradient_checkpointing_func=checkpoint)
    else:
        raise UserError("gradient_checkpointing", type(model).__name__, "this model cannot checkpoint; leave it off")


def recomputing() -> bool:
    """Whether this forward is a recomputation inside backward (hooks that collect must not collect twice)."""
    return torch._C._current_graph_task_id() != -1
