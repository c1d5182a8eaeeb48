"""Names for the places of a model: what every weight is, in any architecture.

    places = Places.of(model)                       or {"lm": model, "image_encoder": tower}
    places.role("q", "v")                           also the q and v rows of a fused qkv
    places.match(["q_proj", "mlp"])                 names, roles, categories, "all-linear", regular expressions
    places.blocks()                                 blocks in the order they run, with their places
    places.depth_of("lm/model.layers.1.mlp.up_proj.weight")

A *place* is a module with its own weight (and bias), or a parameter that stands alone. Each parameter belongs to exactly one
place. Shapes are given as in y = W x, whatever the storage: (out, in, ...) - GPT-2's Conv1D and embeddings are stored
transposed and say so. `survey.py` reads the places off a module tree; `naming.py` holds the rules of naming.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from temperament.errors import UserError, nearest
from temperament.nn.naming import CATEGORIES, CATEGORY, ROLES


@dataclass(frozen=True, eq=False)
class Place:
    """One weight of a model and what it is.

    name    component/module path, e.g. "lm/model.layers.0.self_attn.q_proj"; for a lone parameter its own path
    role    q k v o qkv kv gate up down gate_up router, norm q_norm k_norm, embed position patch token type condition,
            head, conv, time, modulation, projector, proj, scale, other
    kind    "linear", "conv1d" (GPT-2), "conv", "embedding", "norm", "parameter" (no plain y = W x module to wrap)
    shape   (out, in, ...) as in y = W x; experts come first: (experts, out, in)
    stack, depth   the stack of blocks it is in and its block there; depth None outside, then `where` is "before" or "after"
    cross   of a cross-attention;   stream  "context" for the second stream of a joint attention (SD3, Flux)
    """

    name: str
    role: str
    kind: str
    shape: tuple[int, ...]
    module: nn.Module = field(repr=False)
    parameters: Mapping[str, str] = field(repr=False)  # "weight" or "bias" -> full parameter name
    stack: str = ""
    depth: int | None = None
    where: str = "in"
    cross: bool = False
    stream: str = ""
    attention: str = ""  # the attention it is part of, as component/path
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    experts: int | None = None
    slices: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # role -> [start, stop) of rows, when contiguous
    layout: str = ""  # of a fused weight: "blocked", "grouped" by key head, "interleaved" row by row
    transposed: bool = False
    tied_to: str | None = None

    @property
    def component(self) -> str:
        return self.name.partition("/")[0]

    @property
    def path(self) -> str:
        return self.name.partition("/")[2]

    @property
    def category(self) -> str:
        return CATEGORY[self.role]

    def parameter(self, which: str = "weight") -> nn.Parameter:
        """Its "weight" or "bias", looked up now (so that a replaced parameter is seen)."""
        return getattr(self.module, re.split(r"[./]", self.parameters[which])[-1])

    @property
    def weight(self) -> nn.Parameter:
        return self.parameter("weight")

    @property
    def bias(self) -> nn.Parameter | None:
        return self.parameter("bias") if "bias" in self.parameters else None

    @property
    def roles(self) -> tuple[str, ...]:
        """Its own role and those of the parts it fuses."""
        return (self.role, *(FUSES.get(self.role, ()) if self.layout else ()))

    def matrix(self, value: Tensor | None = None) -> Tensor:
        """The weight (or a tensor stored like it, e.g. its gradient) as (out, in, ...), experts first: a view."""
        w = self.weight if value is None else value
        if not self.transposed:
            return w
        return w.transpose(-1, -2) if self.experts else w.transpose(0, 1)

    def rows(self, role: str | None = None, head: int | None = None) -> Tensor:
        """Indices of the output rows that make `role` (its own role: all of them), of one head only if asked.

        For k and v, `head` counts key heads.
        """
        out = self.shape[1] if self.experts else self.shape[0]
        role = role or self.role
        if role == self.role:
            index = torch.arange(out)
            count = self.kv_heads if role in ("k", "v") else self.heads
        else:
            assert role in self.roles, f"{self.name} ({self.role}) holds no rows of {role!r}"
            count = self.heads if role == "q" else self.kv_heads
            if self.layout == "grouped":
                assert self.heads and self.kv_heads and self.head_dim, f"the heads of {self.name} are not known"
                group = self.heads // self.kv_heads
                grid = torch.arange(out).view(self.kv_heads, group + 2, self.head_dim)
                index = {"q": grid[:, :group], "k": grid[:, group], "v": grid[:, group + 1]}[role].reshape(-1)
            elif self.layout == "interleaved":
                index = torch.arange(FUSES[self.role].index(role), out, len(FUSES[self.role]))
            else:
                index = torch.arange(*self.slices[role])
        if head is None:
            return index
        assert count and role in ("q", "k", "v"), f"{self.name}: rows of {role!r} do not belong to heads"
        return index.view(count, -1)[head]

    def columns(self, head: int) -> Tensor:
        """Indices of the input columns of an output projection that read one head."""
        assert self.role in ("o", "o_down") and self.heads and self.head_dim, f"{self.name} does not read heads"
        return torch.arange(head * self.head_dim, (head + 1) * self.head_dim)


FUSES = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "gate_up": ("gate", "up")}


@dataclass(frozen=True, eq=False)
class Block:
    """One block of a stack: its module (for taps and block adapters) and its places. `number` counts over the whole model."""

    component: str
    stack: str
    depth: int
    name: str
    module: nn.Module = field(repr=False)
    number: int = 0
    places: tuple[Place, ...] = field(default=(), repr=False)

    @property
    def key(self) -> tuple[str, int]:
        return self.stack, self.depth


class Depth(NamedTuple):
    """Where a parameter lies: `index` -1 before the first block, `count` after the last; `number` counts over all stacks."""

    stack: str
    index: int
    count: int
    number: int
    total: int

    @property
    def fraction(self) -> float:
        """0 at (or before) the first block of its stack, 1 at (or after) the last."""
        return min(max(self.index / max(self.count - 1, 1), 0.0), 1.0) if self.index < self.count else 1.0


class Places:
    """An ordered collection of places. Filters give smaller collections that still know the whole model."""

    def __init__(self, places: Iterable[Place], blocks: Iterable[Block], wanted: Mapping[str, tuple[str, ...]] | None = None,
                 whole: Places | None = None):
        self._places = {p.name: p for p in places}
        self._blocks = tuple(blocks)
        self._wanted = dict(wanted or {})
        self._whole = whole or self

    @classmethod
    def of(cls, model: nn.Module | Mapping[str, nn.Module]) -> Places:
        from temperament.nn.survey import component_name, survey

        components = model if isinstance(model, Mapping) else {component_name(model): model}
        return cls(*survey(components))

    def __iter__(self) -> Iterator[Place]:
        return iter(self._places.values())

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Place:
        if name not in self._places:
            raise UserError("place", name, nearest(name, self._places))
        return self._places[name]

    def __repr__(self) -> str:
        return f"Places({len(self)}: {', '.join(list(self._places)[:3])}{', ...' if len(self) > 3 else ''})"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._places)

    @property
    def whole(self) -> Places:
        """All places of the model this collection was filtered from."""
        return self._whole

    # --- filters -----------------------------------------------------------------------------------------------------------

    def only(self, keep: Callable[[Place], bool], wanted: Mapping[str, tuple[str, ...]] | None = None) -> Places:
        """Places for which `keep` holds; `wanted` says of which roles only some rows were asked."""
        kept = [p for p in self if keep(p)]
        before = {p.name: self._wanted[p.name] for p in kept if p.name in self._wanted}
        return Places(kept, self._blocks, {**before, **(wanted or {})}, self._whole)

    def role(self, *roles: str, fused: bool = True) -> Places:
        """Places of these roles. With `fused`, also weights that hold such a role among others; `rows` then says which rows."""
        for r in roles:
            if r not in ROLES:
                raise UserError("role", r, nearest(r, ROLES))
        part = {}
        for p in self if fused else ():
            held = tuple(r for r in roles if r in p.roles)
            if held and p.role not in roles:
                part[p.name] = held
        return self.only(lambda p: p.role in roles or p.name in part, part)

    def category(self, *categories: str) -> Places:
        for c in categories:
            if c not in CATEGORIES:
                raise UserError("category", c, nearest(c, CATEGORIES))
        return self.only(lambda p: p.category in categories)

    @property
    def usual(self) -> Places:
        """Those that are trained where nothing else is asked: without what only reads the captions of a denoiser."""
        beside = {"text_encoder"} if any(p.component == "denoiser" for p in self._whole) else set()
        return self.only(lambda p: p.component not in beside) if beside else self

    def linear(self) -> Places:
        """All linear maps in blocks, what PEFT calls all-linear: no heads, embeddings, routers or connectors between models.
        Of a network whose blocks hold convolutions alone, those."""
        blocked = any(p.depth is not None for p in self._whole)
        inner = lambda p, *kinds: (p.kind in kinds and p.category not in ("head", "embedding")
                                   and p.role != "router" and (p.depth is not None or not blocked))  # fmt: skip
        kinds = ("linear", "conv1d") if any(inner(p, "linear", "conv1d") for p in self._whole) else ("conv",)
        return self.only(lambda p: inner(p, *kinds))

    def match(self, targets: str | Iterable[str], field: str = "targets") -> Places:
        """Places named by any of `targets`: "all", "all-linear", a role, a category, a path or its last parts ("q_proj",
        "layers.0.mlp"), or a regular expression for the whole path; a component ("text_encoder") means all of it, and
        "text_encoder/q" only what of it is named so. Where none is named, the `usual` ones come first.

        A category wins over a role ("norm" has q_norm too), a role over an equal path part. Raises UserError for a target
        that names nothing, even when others do.
        """
        union: dict[str, tuple[str, ...] | None] = {}
        targets = [targets] if isinstance(targets, str) else list(targets)
        if not targets:
            raise UserError(field, targets, "name at least one place, e.g. 'all-linear'")
        for target in targets:
            found = self._of_component(target, field)
            if not len(found):
                known = {*self._roles(), *(c for c in CATEGORIES if any(p.category == c for p in self)), "all-linear", "all",
                         *(p.path.split(".")[-1] for p in self), *self._places}
                raise UserError(field, target, f"no place has this name or role; {nearest(target, known)}".rstrip("?"))
            for p in found:
                rows = found._wanted.get(p.name)
                before = union.get(p.name, ())
                union[p.name] = None if rows is None or before is None else tuple(dict.fromkeys(before + rows))
        return Places([p for p in self if p.name in union], self._blocks, {n: r for n, r in union.items() if r}, self._whole)

    def _roles(self) -> set[str]:
        return {r for p in self for r in p.roles}

    def _of_component(self, target: str, field: str) -> Places:
        component, slash, rest = target.partition("/")
        own = self.only(lambda p: p.component == component)
        if len(own):
            return own._match(rest, field) if slash else own
        usual = self if slash else self.usual._match(target, field)
        return usual if not slash and len(usual) else self._match(target, field)

    def _match(self, target: str, field: str) -> Places:
        if target == "all":
            return self
        if target == "all-linear":
            return self.linear()
        if target in CATEGORIES:
            return self.category(target)
        if target in ROLES and target in self._roles():
            return self.role(target)
        if re.search(r"[*+?()|^$\[\]\\]", target):
            try:
                pattern = re.compile(target)
            except re.error as problem:
                raise UserError(field, target, f"not a regular expression ({problem})") from None
            return self.only(lambda p: bool(pattern.fullmatch(p.path) or pattern.fullmatch(p.name)))
        ends = f".{target}"

        def named(p: Place) -> bool:
            inside = "." in target and f".{target}." in f".{p.path}."
            return inside or target in (p.name, p.path) or p.path.endswith(ends)

        return self.only(named)

    # --- reading -----------------------------------------------------------------------------------------------------------

    def rows(self, place: Place) -> Tensor | None:
        """The output rows this collection asked of a place (None: all): `places.role("q").rows(c_attn)` are the q rows."""
        wanted = self._wanted.get(place.name)
        return torch.cat([place.rows(r) for r in wanted]) if wanted else None

    def blocks(self) -> list[Block]:
        """The blocks that hold any of these places, in the order they run."""
        held: dict[tuple, list[Place]] = {}
        for p in self:
            held.setdefault((p.component, p.stack, p.depth), []).append(p)
        return [Block(b.component, b.stack, b.depth, b.name, b.module, b.number, tuple(held[key]))
                for b in self._blocks if (key := (b.component, b.stack, b.depth)) in held]

    def parameters(self, tied: bool = False) -> dict[str, tuple[Place, str]]:
        """Parameter name -> (place, "weight" or "bias"); a shared tensor under its first name only, unless `tied`."""
        seen, out = set(), {}
        for p in self:
            for which, name in p.parameters.items():
                tensor = id(p.parameter(which))
                if tied or tensor not in seen:
                    out[name] = (p, which)
                seen.add(tensor)
        return out

    def tied(self) -> list[tuple[str, ...]]:
        """Groups of parameter names that are one tensor, the owner first."""
        groups: dict[int, list[str]] = {}
        for name, (p, which) in self._whole.parameters(tied=True).items():
            groups.setdefault(id(p.parameter(which)), []).append(name)
        return [tuple(g) for g in groups.values() if len(g) > 1]

    @cached_property
    def _every_parameter(self) -> dict[str, tuple[Place, str]]:
        return self.parameters(tied=True)

    def depth_of(self, parameter: str) -> Depth:
        """Where a parameter (or a place) lies in depth, per stack and over the whole model."""
        whole = self._whole
        place = whole._places.get(parameter) or whole._every_parameter.get(parameter, (None,))[0]
        if place is None:
            raise UserError("parameter", parameter, nearest(parameter, whole._every_parameter))
        own = [b for b in self._blocks if (b.component, b.stack) == (place.component, place.stack)]
        total = len(self._blocks)
        if not own:
            return Depth(place.stack, -1 if place.where == "before" else 0, 0, -1 if place.where == "before" else total, total)
        if place.depth is not None:
            return Depth(place.stack, place.depth, len(own), own[place.depth].number, total)
        if place.where == "before":
            return Depth(place.stack, -1, len(own), own[0].number - 1, total)
        return Depth(place.stack, len(own), len(own), own[-1].number + 1, total)
