"""Hidden states by (place, call): read them with `taps`, change them with `patch`. Nothing stays behind.

    with taps(model, "down", at="output") as t:         # places by name, role or pattern; or Places, Blocks, paths
        model(**inputs)
    t["lm/model.layers.0.mlp.down_proj"]                # (rows, positions, width), of the last call
    t["lm/model.layers.0.mlp.down_proj", 0]             # of the first

    with patch(model, blocks[3], lambda h, at: h + shift):
        model(**inputs)

Both nest in any order, outer first. Both are right under gradient checkpointing with a carried context (`nn.context`): taps do
not collect a recomputation, patches are applied in it again, also when backward runs after the `with` has ended.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from temperament.errors import UserError, nearest
from temperament.nn.context import Intervention, current, intervening, recomputing
from temperament.nn.places import Block, Place, Places
from temperament.nn.survey import component_name

Where = str | Place | Block | Places | Iterable["str | Place | Block"]
Side = Literal["input", "output"]


class At(NamedTuple):
    """Where a value was met: the name of its place or block, and the number of the call in this `with` (from 0)."""

    name: str
    call: int


def modules_at(model: nn.Module | Mapping[str, nn.Module], where: Where) -> dict[str, nn.Module]:
    """Name -> module as it stands in the model now (an adapter around a place included). Order kept."""
    components = model if isinstance(model, Mapping) else {component_name(model): model}
    found: dict[str, nn.Module] = {}
    for item in [where] if isinstance(where, str | Place | Block) else where:
        if isinstance(item, str):
            direct = _module(components, item)
            names = [direct] if direct else Places.of(components).match(item, field="taps").names
        else:
            names = [item.name]
        for name in names:
            component, _, path = name.partition("/")
            if component not in components and not isinstance(model, Mapping):
                component = next(iter(components))  # the places were named for another collection of components
            try:
                module = components[component].get_submodule(path)
            except (KeyError, AttributeError):
                raise UserError("taps", name, "no module of the model, so it is never called; tap a module") from None
            found[name] = module
    return found


def _module(components: Mapping[str, nn.Module], name: str) -> str | None:
    """The full name of an exact module path, with or without its component."""
    component, slash, path = name.partition("/")
    for key, root in components.items():
        inner = path if slash and component == key else name
        if inner and any(inner == n for n, _ in root.named_modules()):
            return f"{key}/{inner}"
    return None


class _Hooked(Intervention):
    """Hooks on some modules that are live only while this object is in the current context."""

    def __init__(self, modules: Mapping[str, nn.Module], at: Side):
        if at not in ("input", "output"):
            raise UserError("at", at, nearest(at, ("input", "output")))
        self.modules, self.at, self._handles = dict(modules), at, []

    def seen(self, value: Tensor, at: At) -> Tensor:
        raise NotImplementedError

    def attach(self) -> None:
        for name, module in self.modules.items():
            if self.at == "output":
                self._handles.append(module.register_forward_hook(self._after(name), with_kwargs=True))
            else:
                self._handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))

    def detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _call(self, name: str, value: Tensor) -> Tensor:
        now = current()
        if self not in now.active:  # a recomputation of a forward that ran without this
            return value
        return self.seen(value, At(name, now.count((id(self), name))))

    def _after(self, name: str):
        def hook(module, args, kwargs, output):
            value, put = _first(output, _main(module, args, kwargs, output))
            new = self._call(name, value)
            return None if new is value else put(new)

        return hook

    def _before(self, name: str):
        def hook(module, args, kwargs):
            value, put = _first(args) if any(isinstance(a, Tensor) for a in args) else _first(kwargs)
            new = self._call(name, value)
            if new is value:
                return None
            return (put(new), kwargs) if any(isinstance(a, Tensor) for a in args) else (args, put(new))

        return hook


def _main(module: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> int:
    """Which of several outputs is the module's own stream. Joint blocks (SD3, Flux) give the text beside the image, some of
    them first: the output shaped like the input `hidden_states` is meant, and where both are, the names in `return` decide."""
    own = kwargs.get("hidden_states", args[0] if args else None)
    joint = isinstance(kwargs.get("encoder_hidden_states"), Tensor)
    if not joint or not isinstance(output, tuple) or not isinstance(own, Tensor):
        return 0
    alike = [i for i, v in enumerate(output) if isinstance(v, Tensor) and v.shape == own.shape]
    if len(alike) < 2:
        return alike[0] if alike else 0
    return 1 if _text_first(type(module)) else 0


@functools.cache
def _text_first(kind: type[nn.Module]) -> bool:
    try:
        return "return encoder_hidden_states, hidden_states" in inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False


def _first(value: Any, start: int = 0) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The main tensor of what a module takes or gives, and a function that puts another in its place."""
    if isinstance(value, Tensor):
        return value, lambda new: new
    if isinstance(value, tuple | list):
        index = next((i for i, v in enumerate(value) if i >= start and isinstance(v, Tensor)), None)
        if index is not None:
            return value[index], lambda new: type(value)([*value[:index], new, *value[index + 1:]])
    if isinstance(value, Mapping):
        key = "hidden_states" if isinstance(value.get("hidden_states"), Tensor) else None
        key = key or next((k for k, v in value.items() if isinstance(v, Tensor)), None)
        if key is not None:
            return value[key], lambda new: type(value)({**value, key: new})
    raise AssertionError(f"no tensor in a {type(value).__name__} to tap")


class Taps(_Hooked):
    """What `taps` collects. `t[name]` is the last call, `t[name, 0]` the first; `t.calls(name)` all of them."""

    def __init__(self, modules: Mapping[str, nn.Module], at: Side, grad: bool, keep: Callable[[Tensor], Tensor] | None):
        super().__init__(modules, at)
        self.grad, self.keep, self._seen = grad, keep, {name: [] for name in modules}

    def seen(self, value: Tensor, at: At) -> Tensor:
        if not recomputing():
            state = value if self.grad else value.detach()
            if self.keep is not None:
                state = self.keep(state)
            # Detached states are copied, views of them too: a later in-place operation of the model must not change what was
            # read, and a piece of a state must not keep the whole alive.
            same = state.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
            self._seen[at.name].append(state.clone() if same and not self.grad else state)
        return value

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._seen)

    def calls(self, name: str | Place | Block) -> list[Tensor]:
        name = name if isinstance(name, str) else name.name
        if name not in self._seen:
            full = [n for n in self._seen if n.partition("/")[2] == name]
            if not full:
                raise UserError("taps", name, nearest(name, self._seen))
            name = full[0]
        return self._seen[name]

    def __getitem__(self, key: str | Place | Block | tuple[str | Place | Block, int]) -> Tensor:
        name, call = key if isinstance(key, tuple) else (key, -1)
        states = self.calls(name)
        if not -len(states) <= call < len(states):
            raise UserError("taps", f"{name}, call {call}", f"it was called {len(states)} times inside the `with`")
        return states[call]

    def __iter__(self) -> Iterator[tuple[At, Tensor]]:
        return ((At(name, i), state) for name, states in self._seen.items() for i, state in enumerate(states))

    def __len__(self) -> int:
        return sum(map(len, self._seen.values()))

    def clear(self) -> None:
        for states in self._seen.values():
            states.clear()


class Patch(_Hooked):
    def __init__(self, modules: Mapping[str, nn.Module], at: Side, function: Callable[[Tensor, At], Tensor]):
        super().__init__(modules, at)
        self.function = function

    def seen(self, value: Tensor, at: At) -> Tensor:
        return self.function(value, at)


@contextmanager
def taps(model: nn.Module | Mapping[str, nn.Module], where: Where, at: Side = "output", grad: bool = False,
         keep: Callable[[Tensor], Tensor] | None = None) -> Iterator[Taps]:
    """Collect the main input or output of these places, call by call.

    grad  keep the graph, so that a loss may use the states (else detached copies)
    keep  store only a function of each state, e.g. `lambda h: h[:, -1]`
    """
    found = Taps(modules_at(model, where), at, grad, keep)
    with intervening(found):
        yield found


@contextmanager
def patch(model: nn.Module | Mapping[str, nn.Module], where: Where, function: Callable[[Tensor, At], Tensor],
          at: Side = "output") -> Iterator[None]:
    """Replace the main input or output h of these places by `function(h, at)`; returning h itself changes nothing."""
    with intervening(Patch(modules_at(model, where), at, function)):
        yield
