"""One statement of a merge, carried out in memory or streamed from folders: a few passes over the blocks of each tensor.

    class Stock(Blockwise):
        def plan(self, site):                        # one tensor of all models
            gram = sum((yield Gather(products)))     # a pass: every block is seen; the values come back in block order
            t = ...
            return lambda b: ...                     # the last pass: a block of the result

A block `b` holds `b.x`, flat fp32 tensors, one a model: its differences from the base (space "difference"; the result is a
difference too) or its weights (space "weights"). They may be overwritten. `b.base` is the base's block. A method that
needs no statistics returns its last pass at once; one that needs whole rows or tensors says so (`grain`); one that looks at
all tensors together has a `survey`. The blocks of a tensor are the same however it is carried out, so streaming equals
in-memory bit for bit. Memory: threads x (models + 1 + what a pass makes) x BLOCK elements, whatever the size of the models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from temperament.delta.delta import Delta
from temperament.errors import UserError

BLOCK = 1 << 18  # elements: a block of each model and what is made of them stay in a core's cache

Setting = float | list[Any]  # a number; numbers: a gradient over depth; [{filter, value}, ...]: the first that fits a name
Settings = float | list[Any]  # one for all models, or a list: one Setting a model


def evaluate(setting: Any, name: str, depth: float, field_: str = "setting") -> float:
    """The number a setting has for a tensor. depth: 0 first block, 1 last."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        if isinstance(setting, str):
            try:
                return float(setting)  # YAML reads 1e-3 as a word
            except ValueError:
                raise UserError(field_, setting, "give a number") from None
        return setting
    if setting and all(not isinstance(v, Mapping) for v in setting):
        values = [evaluate(v, name, depth, field_) for v in setting]
        if any(isinstance(v, bool) for v in values):
            return values[int(depth * (len(values) - 1))]
        at = depth * (len(values) - 1)
        low = min(int(at), len(values) - 1)
        part = at - low
        return (1 - part) * values[low] + part * values[min(low + 1, len(values) - 1)]
    for rule in setting:
        if not isinstance(rule, Mapping) or "value" not in rule:
            raise UserError(field_, rule, "write numbers, or rules {filter: part of a name, value: number}")
        if rule.get("filter") in (None, "*") or rule["filter"] in name:
            return evaluate(rule["value"], name, depth, field_)
    raise UserError(field_, setting, f"no rule fits {name!r}; end the list with a rule without a filter")


@dataclass(frozen=True)
class Site:
    """One tensor over all models, and what the method's settings are there."""

    name: str
    shape: tuple[int, ...]
    models: int
    depth: float = 0.0
    method: str = "merge"
    grain: str = "element"
    state: Any = field(default=None, compare=False)  # what the survey gave

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Elements of a row: all that belongs to one index of the first axis; a vector is one row."""
        return self.numel // self.shape[0] if len(self.shape) > 1 and self.shape[0] else self.numel

    @property
    def bare(self) -> str:
        return self.name.split("/", 1)[-1]

    def one(self, setting: Setting, of: str = "") -> float:
        return evaluate(setting, self.bare, self.depth, f"{self.method}.{of}" if of else self.method)

    def each(self, settings: Settings, of: str = "", default: float = 1.0) -> list[float]:
        """A value a model: one number for all, or a list with one setting a model; an empty list: the default."""
        name = f"{self.method}.{of}" if of else self.method
        if not isinstance(settings, list) or not settings:
            settings = [default if isinstance(settings, list) else settings] * self.models
        if len(settings) != self.models:
            raise UserError(name, settings, f"{self.models} models are merged; give as many values")
        return [evaluate(s, self.bare, self.depth, name) for s in settings]

    def parts_of_one(self, settings: Settings, of: str = "weights") -> list[float]:
        """The values of `each`, divided by their sum."""
        w = self.each(settings, of)
        if sum(w) == 0:
            raise UserError(f"{self.method}.{of}", settings, "they sum to 0, so none is a share of the whole; change them")
        return [a / sum(w) for a in w]

    def spans(self) -> list[tuple[int, int]]:
        """(start, stop) of its blocks: whole rows or the whole tensor where the method's grain asks for it."""
        size = BLOCK
        if self.grain != "element":
            size = self.numel if self.grain == "tensor" else max(BLOCK // max(self.row, 1), 1) * self.row
        return [(start, min(start + size, self.numel)) for start in range(0, self.numel, max(size, 1))]


@dataclass
class Block:
    """Flat elements from `start` on. x: one fp32 tensor a model, free to be overwritten; base: the base's, only to be read."""

    site: Site
    start: int
    x: list[Tensor]
    base: Tensor | None = None


@dataclass(frozen=True)
class Gather:
    """A pass whose values come back as a list, in the order of names and blocks."""

    of: Callable[[Block], Any]


@dataclass(frozen=True)
class Total:
    """A pass whose values, lists of integer arrays, are added up as they come."""

    of: Callable[[Block], list]


@dataclass(frozen=True)
class Made:
    """A pass of a survey over what another method (its survey gave `state`) makes of the same models, gathered."""

    method: Any
    state: Any
    of: Callable[[Tensor, Block], Any]  # of a block of the result


Combine = Callable[[Block], Tensor]
Plan = Combine | Generator[Gather | Total, Any, Combine]


class Blockwise:
    """What a merge method inherits. It states `plan(site)`; the rest follows."""

    space = "difference"  # or "weights"
    grain = "element"  # or "row", "tensor": what a block never cuts
    needs_base = True  # False: the models alone are enough
    everywhere = False  # True: it changes also what all models left as it was (it scales weights)
    fewest, most = 1, None  # models

    def plan(self, site: Site) -> Plan:
        raise NotImplementedError

    def survey(self, sites: list[Site]) -> Generator | Any:
        """Passes over all tensors together, of which it is given those that some model changed; what it returns is
        `site.state`."""
        return None

    def baseless(self) -> Blockwise:
        """The same merge without a base, where the models alone give it; else itself."""
        return self

    def shares(self, models: int) -> list[float]:
        """Of each model in the mean of what they add to the base."""
        return [1 / models] * models

    def check(self, models: int) -> None:
        name = getattr(type(self), "part_name", "merge")
        if models < self.fewest or (self.most is not None and models > self.most):
            most = f", at most {self.most}" if self.most else ""
            count = self.fewest if self.fewest == self.most else f"at least {self.fewest}{most}"
            raise UserError(f"{name}: number of models", models, f"it merges {count}; name as many")

    def merge(self, base: Any, deltas: Sequence[Delta]) -> Delta:
        """base: a Base, module, folder or {name: tensor}; deltas of it -> their merge. Lazy where a delta is."""
        from temperament.delta.merge_run import in_memory

        return in_memory(self, base, deltas)
