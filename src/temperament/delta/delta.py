"""Delta: the change a step made. What merge, dial, blame, diagnose, export and serve speak.

    base + strength * (changes to base tensors, additions with no base counterpart, buffers)

Names are `component/parameter`. `changes` and `buffers` are mappings and may be lazy (`Lazy`): then each entry is read or
computed when it is asked for, and a delta of any size passes through a few buffers.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from temperament.delta import use
from temperament.delta.change import Change, Dense
from temperament.delta.combined import add
from temperament.delta.hash import line, tensor_sha
from temperament.delta.on_weight import Replace
from temperament.errors import UserError, nearest


class Lazy(Mapping):
    """Known names, values made on access and not kept."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Any]):
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name):
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)

    def __contains__(self, name):
        return name in self._names


def _like(names: Iterable[str], make: Callable[[str], Any], *sources: Mapping) -> Mapping:
    """A mapping as lazy as the ones it is made from."""
    lazy = Lazy(names, make)
    return lazy if any(isinstance(source, Lazy) for source in sources) else dict(lazy)


@dataclass(frozen=True, eq=False)
class Addition:
    """Tensors with no base counterpart, hung at a place, and the part (name, options) that rebuilds their module.

    strength scales the module's output, which only that part can do. `merges` says whether it can become base weights: "never",
    or "given the input" (a router, a prompt). `ship` is False for what served training alone (a critic, a discriminator).
    An empty `part` is a plain tensor under that name (an output head the base lacks).
    """

    part: str
    config: Mapping
    tensors: Mapping[str, Tensor]
    strength: float = 1.0
    merges: Literal["given the input", "never"] = "never"
    ship: bool = True


@dataclass(frozen=True, eq=False)
class Delta:
    """base: {component: sha256} of what it was made on (empty: unknown). strength 0 is the base, bit for bit.

    buffers are changes too (a tensor given for one is its new value): statistics and counters, kept apart as not trained.
    """

    changes: Mapping[str, Change] = field(default_factory=dict)
    additions: Mapping[str, Addition] = field(default_factory=dict)
    buffers: Mapping[str, Change] = field(default_factory=dict)
    base: Mapping[str, str] = field(default_factory=dict)
    strength: float = 1.0
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.buffers, Lazy):
            made = {name: Replace(b) if isinstance(b, Tensor) else b for name, b in self.buffers.items()}
            object.__setattr__(self, "buffers", made)
        for name in (*self.changes, *self.additions, *self.buffers):
            assert "/" in name, f"{name!r} is not component/path"

    # -- what it holds ------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return sorted({*self.changes, *self.additions, *self.buffers})

    @property
    def components(self) -> list[str]:
        return sorted({name.split("/", 1)[0] for name in self.names})

    @property
    def merges(self) -> dict[str, str]:
        """For every name: "exactly" (becomes base weights), "given the input" or "never"."""
        return {n: self.additions[n].merges if n in self.additions else "exactly" for n in self.names}

    def change(self, name: str) -> Change:
        """The change of one parameter or buffer, with the delta's strength in it."""
        found = self.changes if name in self.changes else self.buffers
        if name not in found:
            raise UserError("parameter", name, f"this delta does not change it; {nearest(name, self.names)}")
        return found[name].scaled(self.strength)

    def items(self) -> Iterator[tuple[str, Change]]:
        """(name, change with the strength in it) in name order, one at a time."""
        return ((name, self.change(name)) for name in sorted(self.changes))

    def entries(self) -> Iterator[tuple[str, str, dict, Mapping[str, Tensor]]]:
        """(section, name, config, tensors) of all there is, by section and name; a lazy entry is made once a walk."""
        for section, held in (("change", self.changes), ("buffer", self.buffers)):
            for name in sorted(held):
                change = held[name]
                yield section, name, change.config(), change.tensors()
        for name, a in sorted(self.additions.items()):
            config = {"part": a.part, "config": dict(a.config), "strength": a.strength, "merges": a.merges, "ship": a.ship}
            yield "addition", name, config, a.tensors

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) of all that was trained, in a fixed order; keys as in the saved file."""
        for section, name, _, tensors in self.entries():
            yield from ((f"{section}:{name}:{key}", t) for key, t in sorted(tensors.items()))

    @property
    def parameters(self) -> int:
        return sum(t.numel() for _, t in self.tensors())

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, t in self.tensors())

    @property
    def digest(self) -> str:
        """sha256 of the trained tensors in name order (name, dtype, shape, bytes). Scales are hyperparameters and not in it."""
        sha = hashlib.sha256()
        for key, tensor in self.tensors():
            sha.update(line(key, tensor.dtype, tensor.shape, tensor_sha(tensor)).encode())
        return sha.hexdigest()

    def norms(self, base: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """Frobenius norm of every change, strength included; `base` (a Source or dict) serves changes that need the weight."""
        return {name: c.norm(self._weight(base, name) if c.needs_weight else None) for name, c in self.items()}

    @staticmethod
    def _weight(base: Mapping[str, Tensor] | None, name: str) -> Tensor:
        assert base is not None, f"{name} is a function of the base weight: pass base={{name: tensor}}"
        return base[name]

    # -- algebra --------------------------------------------------------------------------------------------------------

    def __mul__(self, a: float) -> Delta:
        return replace(self, strength=self.strength * a)

    __rmul__ = __mul__

    def __neg__(self) -> Delta:
        return self * -1.0

    def __add__(self, other: Delta) -> Delta:
        """The sum of two deltas on one base. Changes and buffers add; modules do not, so a shared addition is refused."""
        for part in sorted({*self.base} & {*other.base}):
            if self.base[part] != other.base[part]:
                mend = f"the other delta was made on {self.base[part][:12]}; use deltas of one base"
                raise UserError(f"base of {part}", other.base[part][:12], mend)
        both = sorted({*self.additions} & {*other.additions})
        if both:
            raise UserError("addition", both[0], "both deltas bring it and modules do not add; restrict one of them")

        def total(name: str) -> Change:
            found = [d.change(name) for d in (self, other) if name in d.changes or name in d.buffers]
            return found[0] if len(found) == 1 else add(*found)

        def union(section: str) -> Mapping:
            pair = [getattr(d, section) for d in (self, other)]
            return _like(sorted({*pair[0], *pair[1]}), total, *pair)

        pairs = [(d.strength, n, a) for d in (self, other) for n, a in d.additions.items()]
        additions = {n: replace(a, strength=a.strength * strength) for strength, n, a in pairs}
        return Delta(union("changes"), additions, union("buffers"), {**self.base, **other.base})

    def __sub__(self, other: Delta) -> Delta:
        return self + -other

    def restrict(self, to: Iterable[str] | Callable[[str], bool]) -> Delta:
        """The part of the delta at these names (each must exist), or where the predicate holds."""
        if not callable(to):
            wanted = set(to)
            for name in sorted(wanted - {*self.names}):
                raise UserError("restriction", name, f"the delta has no such name; {nearest(name, self.names)}")
            to = wanted.__contains__
        kept = [_like(filter(to, m), m.__getitem__, m) for m in (self.changes, self.additions, self.buffers)]
        parts = {name.split("/", 1)[0] for m in kept for name in m}
        return replace(
            self, changes=kept[0], additions=kept[1], buffers=kept[2], base={p: s for p, s in self.base.items() if p in parts}
        )

    def remap(self, names: Mapping[str, str] | Callable[[str], str]) -> Delta:
        """The same changes under other names (an emulator's layers in the full model, another component); unnamed ones stay."""
        new = names if callable(names) else lambda name: names.get(name, name)

        def renamed(m: Mapping) -> Mapping:
            back = {new(name): name for name in m}
            if len(back) != len(m):
                clash = next(n for n in m if back[new(n)] != n)
                raise UserError("name map", new(clash), f"{clash!r} and {back[new(clash)]!r} would both become it")
            return _like(back, lambda name: m[back[name]], m)

        return replace(self, changes=renamed(self.changes), additions=renamed(self.additions), buffers=renamed(self.buffers))

    def baked(self) -> Delta:
        """The same delta at strength 1: the strength is in each change and addition."""
        if self.strength == 1:
            return self
        additions = {n: replace(a, strength=a.strength * self.strength) for n, a in self.additions.items()}
        changes, buffers = (_like(m, self.change, m) for m in (self.changes, self.buffers))
        return replace(self, changes=changes, additions=additions, buffers=buffers, strength=1.0)

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> Delta:
        """The same delta with `fn` applied to every tensor (move, cast)."""
        additions = {n: replace(a, tensors={k: fn(t) for k, t in a.tensors.items()}) for n, a in self.additions.items()}
        changes, buffers = (_like(m, lambda name, m=m: m[name].mapped(fn), m) for m in (self.changes, self.buffers))
        return replace(self, changes=changes, additions=additions, buffers=buffers)

    def materialise(self, base: Mapping[str, Tensor] | None = None) -> Delta:
        """Every change dense, at strength 1; what needs the weight reads `base`. Additions and buffers are kept."""

        def dense(name: str) -> Dense:
            change = self.change(name)
            return Dense(change.delta(self._weight(base, name) if change.needs_weight else None))

        return replace(self.baked(), changes=_like(self.changes, dense, self.changes))

    # -- use ------------------------------------------------------------------------------------------------------------

    def check_base(self, base: Mapping[str, str], allow_transplant: bool = False) -> Delta:
        """This delta, if every component it touches is the one it was made on. Else UserError, or a recorded transplant."""
        wrong = [p for p in self.components if p in self.base and base.get(p) != self.base[p]]
        if not wrong:
            return self
        if not allow_transplant:
            mend = f"the delta was made on {self.base[wrong[0]][:12]}; load that base, or allow a transplant to record it"
            raise UserError(f"base of {wrong[0]}", (base.get(wrong[0]) or "missing")[:12], mend)
        moved = {p: {"from": self.base[p], "to": base.get(p)} for p in wrong}
        now = {**self.base, **{p: base[p] for p in wrong if p in base}}
        return replace(self, base=now, meta={**self.meta, "transplanted": moved})

    def apply(self, to, build: Callable[[str, Addition, Any], None] | None = None):
        """base -> tuned. A dict of tensors gives a new dict (untouched ones shared); modules are changed in place and returned.

        `to`: {name: tensor} (full names, or bare ones where the delta has one component), a module, or {component: module}.
        build(place, addition, to) hangs an addition; without it a delta that ships additions is refused.
        """
        return use.apply(self, to, build)

    def applied(self, to) -> contextlib.AbstractContextManager:
        """The modules tuned inside the block, the base bit for bit after it (the dial and blame walk through many of these)."""
        return use.applied(self, to)

    def save(self, folder, overwrite: bool = False) -> None:
        """`delta.json` and `delta.safetensors` in a folder that appears whole or not at all."""
        from temperament.delta.store import save

        save(self, folder, overwrite)

    @staticmethod
    def load(folder, lazy: bool = False) -> Delta:
        """Read what `save` wrote, a PEFT adapter directory or a LoRA of diffusers. Tensors are checked against their sha256
        (lazy: on access)."""
        from temperament.delta.diffusers_format import is_diffusers_lora, read_diffusers_lora
        from temperament.delta.peft_format import is_peft, read_peft
        from temperament.delta.store import load

        if is_diffusers_lora(folder):
            return read_diffusers_lora(folder)
        return read_peft(folder) if is_peft(folder) else load(folder, lazy)

