"""A change: a small expression on one base weight.

    W' = W + scale * difference(W)          scale 0 is W, bit for bit; scale 1 is what was trained

Every kind states `difference` once; merge, dial, export, diagnosis and serving use nothing else. Kinds whose `difference`
reads W (`needs_weight`) are in `on_weight.py`, those built from other changes in `combined.py`. A kind is a frozen dataclass:
its tensor fields, nested changes and plain fields are also how it is saved, so a new kind needs no other code.

Arithmetic is done in fp32 (fp64 where an operand is) and rounded once, to the dtype of W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from temperament.errors import UserError, nearest

Layout = Literal["linear", "conv1d", "embedding"]


def wide(tensor: Tensor) -> Tensor:
    """The dtype arithmetic is done in: fp64 stays, everything else becomes fp32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if dtype.is_floating_point else value.round().to(dtype)


@dataclass(frozen=True, eq=False)
class Change:
    kind: ClassVar[str] = ""
    kinds: ClassVar[dict[str, type[Change]]] = {}
    reads_weight: ClassVar[bool] = False

    scale: float = field(default=1.0, kw_only=True)

    def __init_subclass__(cls, kind: str, **rest):
        super().__init_subclass__(**rest)
        cls.kind = kind
        Change.kinds[kind] = cls

    # -- what a kind states -------------------------------------------------------------------------------------------

    def difference(self, weight: Tensor | None) -> Tensor:
        """W' - W at scale 1, dense, in the shape of the weight."""
        raise NotImplementedError

    def moved(self, weight: Tensor) -> Tensor:
        """W' at scale 1; a kind that knows W' better than by adding overrides it."""
        return wide(weight) + self.difference(weight)

    @property
    def weight_shape(self) -> tuple[int, ...] | None:
        """Shape of the weight, or None where several shapes fit (a factor for each row)."""
        return None

    # -- what every kind then has --------------------------------------------------------------------------------------

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """The dense difference scale * difference(W); W is needed only where `needs_weight`."""
        assert weight is not None or not self.needs_weight, f"{self.kind} is a function of the weight: pass it"
        return self.difference(weight) * self.scale if self.scale != 1 else self.difference(weight)

    def apply(self, weight: Tensor) -> Tensor:
        """W' in the dtype of W. Scale 0 returns W itself."""
        if self.scale == 0:
            return weight
        new = self.moved(weight) if self.scale == 1 else wide(weight) + self.scale * self.difference(weight)
        return rounded(new, weight.dtype)

    def scaled(self, a: float) -> Change:
        return self if a == 1 else replace(self, scale=self.scale * a)

    def norm(self, weight: Tensor | None = None) -> float:
        """Frobenius norm of the dense difference."""
        return float(torch.linalg.vector_norm(self.delta(weight)))

    @property
    def needs_weight(self) -> bool:
        return self.reads_weight or any(change.needs_weight for _, change in self._nested())

    @property
    def parameters(self) -> int:
        return sum(t.numel() for t in self.tensors().values())

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    # -- saving: fields that are tensors or changes, and the rest ----------------------------------------------------------

    def _nested(self) -> Iterator[tuple[str, Change]]:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Change):
                yield f.name, value
            elif isinstance(value, tuple) and value and isinstance(value[0], Change):
                yield from ((f"{f.name}.{i}", change) for i, change in enumerate(value))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a dotted key, those of nested changes included."""
        own = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return own | {f"{at}.{key}": t for at, change in self._nested() for key, t in change.tensors().items()}

    def config(self) -> dict:
        """All that is not a tensor, as JSON; `Change.read(config, tensors)` is the inverse."""

        def plain(value):
            if isinstance(value, Change):
                return value.config()
            return [plain(v) for v in value] if isinstance(value, tuple) else value

        members = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"kind": self.kind} | {k: plain(v) for k, v in members.items() if not isinstance(v, Tensor) and v is not None}

    @staticmethod
    def read(config: Mapping, tensors: Mapping[str, Tensor]) -> Change:
        """Rebuild a saved change. UserError for a kind or a set of fields that does not exist."""
        name = config.get("kind") if isinstance(config, Mapping) else config
        if name not in Change.kinds:
            raise UserError("change.kind", name, nearest(str(name), Change.kinds))

        def inner(at: str) -> dict[str, Tensor]:
            return {key[len(at) + 1 :]: t for key, t in tensors.items() if key.startswith(at + ".")}

        def value(at: str, v):
            if isinstance(v, Mapping):
                return Change.read(v, inner(at))
            return tuple(value(f"{at}.{i}", x) for i, x in enumerate(v)) if isinstance(v, list) else v

        own = {key: t for key, t in tensors.items() if "." not in key}
        scale = config.get("scale", 1.0)
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise UserError("change.scale", scale, "it must be a finite number")
        try:
            return Change.kinds[name](**{k: value(k, v) for k, v in config.items() if k != "kind"}, **own)
        except TypeError:
            mend = f"its fields are not those of a {name!r} change; it was edited or cut"
            raise UserError("change", dict(config), mend) from None

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> Change:
        """The same expression with `fn` applied to every tensor (move, cast, detach)."""
        return Change.read(self.config(), {key: fn(t) for key, t in self.tensors().items()})


@dataclass(frozen=True, eq=False)
class Dense(Change, kind="dense"):
    """W + d;   d in the shape of W."""

    d: Tensor

    def difference(self, weight=None):
        return wide(self.d)

    @property
    def weight_shape(self):
        return tuple(self.d.shape)


@dataclass(frozen=True, eq=False)
class Sparse(Change, kind="sparse"):
    """W[i] + v, or with `new` W[i] = v, at flat positions i; zero elsewhere.   indices, values (n,); indices are distinct.

    `new` keeps the tuned entries themselves, exact where W + (W' - W) would round.
    """

    indices: Tensor
    values: Tensor
    shape: tuple[int, ...]
    new: bool = False

    @property
    def needs_weight(self):
        return self.new

    @property
    def weight_shape(self):
        return tuple(self.shape)

    def difference(self, weight=None):
        at, values = self.indices.long(), wide(self.values)
        if self.new:
            values = values - wide(weight).reshape(-1)[at]
        flat = torch.zeros(math.prod(self.shape), dtype=values.dtype, device=values.device)
        return flat.index_add(0, at, values).view(self.shape)

    def moved(self, weight):
        at, flat = self.indices.long(), weight.reshape(-1)
        if self.new:
            return flat.index_copy(0, at, self.values.to(weight.dtype)).view(self.shape)
        return wide(flat).index_add(0, at, wide(self.values)).view(self.shape)

    @staticmethod
    def changed(old: Tensor, new: Tensor) -> Sparse:
        """The entries in which `new` differs from `old`, with their new values: exact."""
        return Sparse.at(new, (old != new).reshape(-1).nonzero().squeeze(1))

    @staticmethod
    def at(weight: Tensor, positions: Tensor) -> Sparse:
        """The weight's own values at these flat positions."""
        dtype = torch.int32 if weight.numel() < 2**31 else torch.int64
        return Sparse(positions.to(dtype), weight.reshape(-1)[positions.long()].clone(), tuple(weight.shape), new=True)

    @staticmethod
    def of(difference: Tensor) -> Sparse:
        """The nonzero entries of a dense difference."""
        at = difference.reshape(-1).nonzero().squeeze(1)
        dtype = torch.int32 if difference.numel() < 2**31 else torch.int64
        return Sparse(at.to(dtype), difference.reshape(-1)[at], tuple(difference.shape))


@dataclass(frozen=True, eq=False)
class LowRank(Change, kind="low_rank"):
    """W + scale * B A;   A (rank, in) or (rank, in, *kernel), B (out, rank), scale = alpha / rank.

    A and B are named by what they do, not by how W is stored: `conv1d` (GPT-2, stored in x out) and `embedding` (vocabulary x
    width) have W the other way round, and the difference is (B A)^T.
    """

    A: Tensor
    B: Tensor
    layout: Layout = "linear"

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def weight_shape(self):
        shape = (self.B.shape[0], *self.A.shape[1:])
        return shape if self.layout == "linear" else shape[::-1]

    def difference(self, weight=None):
        product = wide(self.B) @ wide(self.A).flatten(1)
        return product.view(self.weight_shape) if self.layout == "linear" else product.T

    def norm(self, weight=None):
        """sqrt(tr(B^T B A A^T)): two rank x rank matrices instead of the product."""
        A, B = self.A.double().flatten(1), self.B.double()
        return abs(self.scale) * float(((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt())


@dataclass(frozen=True, eq=False)
class Kronecker(Change, kind="kronecker"):
    """W + scale * (a kron b);   a (p, q), b (m, n, *kernel), W (p m, q n, *kernel)."""

    a: Tensor
    b: Tensor

    @property
    def weight_shape(self):
        return (self.a.shape[0] * self.b.shape[0], self.a.shape[1] * self.b.shape[1], *self.b.shape[2:])

    def difference(self, weight=None):
        a = wide(self.a)
        return torch.kron(a.reshape(*a.shape, *[1] * (self.b.dim() - 2)), wide(self.b))

    def norm(self, weight=None):
        return abs(self.scale) * float(self.a.double().norm() * self.b.double().norm())


@dataclass(frozen=True, eq=False)
class Ternary(Change, kind="ternary"):
    """W + scale * s, s in {-1, 0, 1};   plus, minus: bitmaps of the flat positions, ceil(n / 8) bytes each: 2 bits an entry."""

    plus: Tensor
    minus: Tensor
    shape: tuple[int, ...]

    @staticmethod
    def pack(signs: Tensor, scale: float = 1.0) -> Ternary:
        """From a tensor whose signs count."""
        flat = signs.detach().reshape(-1).cpu()
        plus, minus = (torch.from_numpy(np.packbits(bits.numpy())) for bits in (flat > 0, flat < 0))
        return Ternary(plus, minus, tuple(signs.shape), scale=scale)

    @property
    def signs(self) -> Tensor:
        """int8 in the shape of the weight."""
        n = math.prod(self.shape)
        plus, minus = (np.unpackbits(bits.cpu().numpy(), count=n).astype(np.int8) for bits in (self.plus, self.minus))
        return torch.from_numpy(plus - minus).view(self.shape).to(self.plus.device)

    @property
    def weight_shape(self):
        return tuple(self.shape)

    def difference(self, weight=None):
        return self.signs.float()
