"""One statement of a merge, carried out in memory or streamed from folders: a few passes over the blocks of each tensor.

    class Stock(Blockwise):
        def plan(self, site):                        # one tensor of all models
            gram = sum((yield Gather(products)))     # a pass: the function sees every block; its values come back in block order
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
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from inspect import isgenerator
from typing import Any

import torch
from torch import Tensor

from temperament.delta.change import Dense, wide
from temperament.delta.delta import Delta, Lazy
from temperament.delta.depth import depths
from temperament.delta.on_weight import Replace
from temperament.delta.stream import Memory, Source, finite, open_source
from temperament.delta.sweep import Buffers, cores, one_thread_each
from temperament.errors import UserError

BLOCK = 1 << 18  # elements: a block of each model and what is made of them stay in a core's cache
GROUP = 1 << 25  # elements whose passes follow each other: what a later pass reads again is still in the page cache

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
    state: Any = None  # what the survey gave

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Elements of a row: all that belongs to one index of the first axis; a vector is one row."""
        return self.numel // self.shape[0] if len(self.shape) > 1 and self.shape[0] else self.numel

    def one(self, setting: Setting, of: str = "") -> float:
        return evaluate(setting, self.name, self.depth, f"{self.method}.{of}" if of else self.method)

    def each(self, settings: Settings, of: str = "", default: float = 1.0) -> list[float]:
        """A value a model: one number for all, or a list with one setting a model; an empty list: the default."""
        name = f"{self.method}.{of}" if of else self.method
        if not isinstance(settings, list) or not settings:
            settings = [default if isinstance(settings, list) else settings] * self.models
        if len(settings) != self.models:
            raise UserError(name, settings, f"{self.models} models are merged; give as many values")
        return [evaluate(s, self.name, self.depth, name) for s in settings]

    def spans(self) -> list[tuple[int, int]]:
        """(start, stop) of its blocks: whole rows or the whole tensor where the method's grain asks for it."""
        size = BLOCK
        if self.grain != "element":
            size = self.numel if self.grain == "tensor" else max(BLOCK // max(self.row, 1), 1) * self.row
        return [(start, min(start + size, self.numel)) for start in range(0, self.numel, max(size, 1))]


@dataclass
class Block:
    """Flat elements start.. of a site. x: one fp32 tensor a model, free to be overwritten; base: the base's, only to be read."""

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


Combine = Callable[[Block], Tensor]
Plan = Combine | Generator[Gather | Total, Any, Combine]


class Blockwise:
    """What a merge method inherits. It states `plan(site)`; the rest follows."""

    space = "difference"  # or "weights"
    grain = "element"  # or "row", "tensor": what a block never cuts
    needs_base = True  # False: the models alone are enough
    fewest, most = 1, None  # models

    def plan(self, site: Site) -> Plan:
        raise NotImplementedError

    def survey(self, sites: list[Site]) -> Generator | Any:
        """Passes over all tensors together; what it returns is `site.state`."""
        return None

    def check(self, models: int) -> None:
        name = getattr(type(self), "part_name", "merge")
        if models < self.fewest or (self.most is not None and models > self.most):
            count = self.fewest if self.fewest == self.most else f"at least {self.fewest}" + (f", at most {self.most}" if self.most else "")
            raise UserError(f"{name}: number of models", models, f"it merges {count}; name as many")

    def merge(self, base: Any, deltas: Sequence[Delta]) -> Delta:
        """base: a Base, module, folder or {name: tensor}; deltas of it -> their merge. Lazy where a delta is."""
        return in_memory(self, base, deltas)


class Inputs:
    """Where the blocks of all models come from."""

    def batches(self, sites: list[Site]) -> Iterator[list[Site]]:
        """Sites that can be worked on at once."""
        yield sites

    def read(self, site: Site, start: int, stop: int, buffers: Buffers) -> Block:
        raise NotImplementedError


@dataclass
class Streamed(Inputs):
    """Blocks of sources, read into reused buffers; every number is looked at on its way."""

    models: Sequence[Source]
    base: Source | None
    space: str

    def read(self, site, start, stop, buffers):
        def get(source: Source, slot: object) -> Tensor:
            block = source.block(site.name, start, stop, buffers(slot, stop - start, source.entry(site.name).dtype))
            if not finite(block):
                raise UserError(f"values of {site.name.split('/', 1)[1]}", "not all finite", f"{source.label} is damaged or its training diverged; use another")
            return block if block.dtype == wide(block).dtype else buffers((slot, "wide"), stop - start, torch.float32).copy_(block)

        base = None if self.base is None else get(self.base, "base")
        x = [get(source, i) for i, source in enumerate(self.models)]
        if self.space == "difference":
            x = [v.sub_(base) if v.dtype == torch.promote_types(v.dtype, base.dtype) else v.to(base.dtype).sub_(base) for v in x]
        return Block(site, start, x, base)


@dataclass
class Held(Inputs):
    """Changes of one base in memory, or lazily read; the tensors of one site at a time."""

    deltas: Sequence[Delta]
    base: Source
    space: str
    at: str = ""
    x: list[Tensor] = field(default_factory=list)
    weight: Tensor | None = None

    def batches(self, sites):
        for site in sites:
            self.enter(site.name)
            yield [site]

    def enter(self, name: str) -> None:
        if self.at == name:
            return
        self.weight = self.base.read(name)
        self.x = []
        for delta in self.deltas:
            held = name in delta.changes or name in delta.buffers
            if self.space == "weights":
                value = wide(delta.change(name).apply(self.weight) if held else self.weight)
            else:
                value = delta.change(name).delta(self.weight) if held else torch.zeros(self.weight.shape)
            self.x.append(value.detach().reshape(-1).cpu())
        self.at = name

    def read(self, site, start, stop, buffers):
        x = [buffers(i, stop - start, v.dtype).copy_(v[start:stop]) for i, v in enumerate(self.x)]
        return Block(site, start, x, wide(self.weight.reshape(-1)[start:stop]))


class Engine:
    """Carries a method out: passes over blocks by threads, torch on one thread in each, values in a fixed order."""

    def __init__(self, method: Blockwise, inputs: Inputs, threads: int | None = None):
        self.method, self.inputs, self.threads, self.buffers = method, inputs, threads or cores(), Buffers()

    def over(self, sites: Iterable[Site], work: Callable[[Block], Any]) -> dict[str, list]:
        """{name: values in block order} of work on every block."""
        stop, found = threading.Event(), {}

        def one(task):
            site, start, end = task
            if stop.is_set():
                return None
            try:
                with torch.no_grad():
                    return work(self.inputs.read(site, start, end, self.buffers))
            except BaseException:
                stop.set()
                raise

        with one_thread_each(), ThreadPoolExecutor(self.threads) as pool:
            for batch in self.inputs.batches(list(sites)):
                tasks = [(site, *span) for site in batch for span in site.spans()]
                for (site, *_), value in zip(tasks, pool.map(one, tasks), strict=True):
                    found.setdefault(site.name, []).append(value)
        return found

    def collect(self, asked: Mapping[Site, Gather | Total]) -> dict[Site, Any]:
        """The values of one pass over some sites."""
        lock, totals = threading.Lock(), {}

        def work(b: Block):
            pass_ = asked[b.site]
            value = pass_.of(b)
            if isinstance(pass_, Gather):
                return value
            with lock:
                held = totals.setdefault(b.site, value)
                if held is not value:
                    for total, more in zip(held, value, strict=True):
                        total += more
            return None

        values = self.over(asked, work)
        return {site: totals.get(site) if isinstance(pass_, Total) else values.get(site.name, []) for site, pass_ in asked.items()}

    def survey(self, sites: list[Site]) -> Any:
        """The state the method's survey gives: its passes go over all sites and come back in name order."""
        made = self.method.survey(sites)
        if not isgenerator(made):
            return made
        values = None
        while True:
            try:
                pass_ = made.send(values)
            except StopIteration as done:
                return done.value
            found = self.collect(dict.fromkeys(sites, pass_))
            if isinstance(pass_, Gather):
                values = [v for site in sites for v in found[site]]
            else:
                values = None
                for site in sites:
                    values = found[site] if values is None else [a + b for a, b in zip(values, found[site], strict=True)]

    def settled(self, sites: list[Site]) -> dict[Site, Combine]:
        """The last pass of every site, after the passes it is made from."""
        ready, waiting, asked = {}, {}, {}

        def step(site: Site, values: Any) -> None:
            try:
                asked[site] = waiting[site].send(values)
            except StopIteration as done:
                ready[site] = done.value

        for site in sites:
            made = self.method.plan(site)
            if isgenerator(made):
                waiting[site] = made
                step(site, None)
            else:
                ready[site] = made
        while asked:
            found = self.collect(asked)
            asked.clear()
            for site, values in found.items():
                step(site, values)
        return ready

    def run(self, sites: list[Site], put: Callable[[Block, Tensor], None]) -> None:
        """Every block of the result to `put`, in any order."""
        for group in groups(sites):
            last = self.settled(group)
            self.over(group, lambda b, last=last: put(b, last[b.site](b)))


def groups(sites: Iterable[Site]) -> Iterator[list[Site]]:
    """Sites in a row with about GROUP elements together."""
    held, size = [], 0
    for site in sites:
        held.append(site)
        size += site.numel
        if size >= GROUP:
            yield held
            held, size = [], 0
    if held:
        yield held


def sites_of(method: Blockwise, shapes: Mapping[str, tuple[int, ...]], models: int, depth_of: Callable[[str], float] | None = None) -> list[Site]:
    depth_of = depth_of or depths(shapes)
    name = getattr(type(method), "part_name", "merge")
    return [Site(n, tuple(shape), models, depth_of(n), name, method.grain) for n, shape in shapes.items()]


def with_state(sites: list[Site], state: Any) -> list[Site]:
    return sites if state is None else [Site(s.name, s.shape, s.models, s.depth, s.method, s.grain, state) for s in sites]


def tensors_of(base: Any) -> Source:
    """A Source for what a merge is given as its base: a Base (its pure weights), or whatever open_source takes."""
    if hasattr(base, "originals") and hasattr(base, "parameters"):
        held = {name: base.originals.get(name, p.detach()) for name, p in base.parameters()}
        buffers = {f"{c}/{n}": b.detach() for c, m in base.components.items() for n, b in m.named_buffers()}
        return Memory(held | buffers, "the base")
    return open_source(base)


def depth_in(base: Any) -> Callable[[str], float] | None:
    """Depth as the base's places know it, where there is a model."""
    if not hasattr(base, "places"):
        return None
    return lambda name: base.places.depth_of(name).fraction


def in_memory(method: Blockwise, base: Any, deltas: Sequence[Delta], threads: int | None = None) -> Delta:
    """See Blockwise.merge. Additions of one delta are kept, of several refused; buffers are averaged, whole numbers kept."""
    method.check(len(deltas))
    source = tensors_of(base)
    names = sorted({n for d in deltas for n in d.changes})
    for name in names:
        shapes = {s for d in deltas if not isinstance(d.changes, Lazy) and name in d.changes and (s := d.changes[name].weight_shape)}
        if any(shape != source.entry(name).shape for shape in shapes):
            raise UserError(f"shape of {name}", [list(s) for s in sorted(shapes)], f"the base has {list(source.entry(name).shape)}; merge changes of this base")
    floating = [n for n in names if source.entry(n).dtype.is_floating_point]
    inputs = Held(deltas, source, method.space)
    engine = Engine(method, inputs, threads)
    sites = sites_of(method, {n: source.entry(n).shape for n in floating}, len(deltas), depth_in(base))
    sites = with_state(sites, engine.survey(sites))
    by_name = {site.name: site for site in sites}

    def make(name: str):
        if name not in by_name:
            return next(d.change(name) for d in deltas if name in d.changes)
        site = by_name[name]
        inputs.enter(name)
        out = torch.empty(site.numel, dtype=torch.float64 if inputs.weight.dtype == torch.float64 else torch.float32)

        def put(b: Block, block: Tensor) -> None:
            out[b.start : b.start + block.numel()] = block

        engine.run([site], put)
        if method.space == "difference":
            return Dense(out.view(site.shape))
        return Replace(out.view(site.shape).to(inputs.weight.dtype))

    lazy = Lazy(names, make)
    additions = {}
    for delta in deltas:
        for name, addition in delta.baked().additions.items():
            if name in additions:
                raise UserError("addition", name, "two models bring it and modules do not merge; restrict one of them")
            additions[name] = addition
    changes = lazy if any(isinstance(d.changes, Lazy) for d in deltas) else dict(lazy)
    return Delta(changes, additions, averaged_buffers(source, deltas), {k: v for d in deltas for k, v in d.base.items()})


def averaged_buffers(base: Source, deltas: Sequence[Delta]) -> dict[str, Replace]:
    """Statistics: the mean over the models, whole numbers from the first."""
    out = {}
    for name in sorted({n for d in deltas for n in d.buffers}):
        weight = base.read(name)
        values = [d.change(name).apply(weight) if name in d.buffers else weight for d in deltas]
        mean = sum(wide(v) for v in values) / len(values) if weight.is_floating_point() else values[0]
        out[name] = Replace(mean.to(weight.dtype))
    return out


def stream(
    method: Blockwise,
    models: Sequence[Source],
    base: Source | None,
    writer: Any,
    names: Iterable[str] | None = None,
    depth_of: Callable[[str], float] | None = None,
    threads: int | None = None,
) -> None:
    """The merge of models, written block by block; names are those of the sources, the writer has them without component.

    What is no floating number is copied from the base, else from the first model.
    """
    method.check(len(models))
    assert base is not None or not method.needs_base, "this method reads the base"
    first = base or models[0]
    names = list(first.names if names is None else names)
    inputs = Streamed(models, base if method.needs_base else None, method.space)
    engine = Engine(method, inputs, threads)
    floating = [n for n in names if first.entry(n).dtype.is_floating_point]
    sites = sites_of(method, {n: first.entry(n).shape for n in floating}, len(models), depth_of or depths(names))
    sites = with_state(sites, engine.survey(sites))

    def put(b: Block, block: Tensor) -> None:
        if method.space == "difference":
            block = b.base + block
        entry = writer.entry(b.site.name.split("/", 1)[1])
        writer.block(b.site.name.split("/", 1)[1], b.start, block if block.dtype == entry.dtype else block.to(entry.dtype))

    engine.run(sites, put)
    for name in set(names) - set(floating):
        writer.write(name.split("/", 1)[1], first.read(name))
