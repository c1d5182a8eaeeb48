"""Carries a merge out: blocks read from memory or from folders, worked on by threads, their values in a fixed order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from inspect import isgenerator
from typing import Any

import torch
from torch import Tensor

from temperament.delta.change import Dense, wide
from temperament.delta.delta import Addition, Delta, Lazy
from temperament.delta.depth import depths
from temperament.delta.merging import Block, Blockwise, Combine, Gather, Made, Site, Total
from temperament.delta.on_weight import Replace
from temperament.delta.stream import Memory, Source, finite, open_source
from temperament.delta.sweep import Buffers, cores, one_thread_each
from temperament.delta.views import wide as wider
from temperament.errors import UserError

GROUP = 1 << 25  # elements whose passes follow each other: what a later pass reads again is still in the page cache


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
        size = stop - start

        def get(source: Source, slot: object) -> Tensor:
            block = source.block(site.name, start, stop, buffers(slot, size, source.entry(site.name).dtype))
            if not finite(block):
                mend = f"{source.label} is damaged or its training diverged; use another"
                raise UserError(f"values of {site.name.split('/', 1)[1]}", "not all finite", mend)
            exact = block.dtype in (torch.float32, torch.float64)
            return block if exact else buffers((slot, "wide"), size, torch.float32).copy_(block)

        base = None if self.base is None else get(self.base, "base")
        x = [get(source, i) for i, source in enumerate(self.models)]
        if self.space == "difference":
            x = [v.to(torch.promote_types(v.dtype, base.dtype)).sub_(base) for v in x]
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


class Same(Blockwise):
    """What nothing changes."""

    space, needs_base, most = "weights", False, 1

    def plan(self, site):
        return lambda b: b.x[0]


class Mean(Blockwise):
    """Of statistics: no method of weights fits them."""

    space, needs_base = "weights", False

    def plan(self, site):
        return lambda b: sum(b.x) / len(b.x)


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
        return {s: totals.get(s) if isinstance(pass_, Total) else values.get(s.name, []) for s, pass_ in asked.items()}

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
            if isinstance(pass_, Made):
                other = Engine(pass_.method, self.inputs, self.threads)
                found = other.made([replace(s, state=pass_.state) for s in sites], pass_.of)
                values = [v for site in sites for v in found[site.name]]
                continue
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
        self.made(sites, lambda out, b: put(b, out))

    def made(self, sites: list[Site], of: Callable[[Tensor, Block], Any]) -> dict[str, list]:
        """{name: values in block order} of every block of the result."""
        found: dict[str, list] = {}
        for group in groups(sites):
            last = self.settled(group)
            found |= self.over(group, lambda b, last=last: of(last[b.site](b), b))
        return found


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


def surveyed(engine: Engine, shapes: Mapping[str, tuple[int, ...]], models: int, depth_of: Callable) -> list[Site]:
    """The sites of a merge, with what the method's survey found."""
    method = engine.method
    name = getattr(type(method), "part_name", "merge")
    sites = [Site(n, tuple(shape), models, depth_of(n), name, method.grain) for n, shape in shapes.items()]
    if method.survey(sites) is None:
        return sites
    state = engine.survey(changed(engine, sites) or sites)
    return [replace(site, state=state) for site in sites]


def changed(engine: Engine, sites: list[Site]) -> list[Site]:
    """The sites at which some model is not the base: the same however models are given (a folder holds all tensors, an adapter
    names the few it changes), so that what looks at all tensors together finds the same in all of them."""

    def differs(b: Block) -> bool:
        if engine.method.space == "difference":
            return any(bool(v.any()) for v in b.x)
        return b.base is None or any(not torch.equal(v, b.base) for v in b.x)

    found = engine.collect(dict.fromkeys(sites, Gather(differs)))
    return [site for site in sites if any(found[site])]


def tensors_of(base: Any) -> Source:
    """A Source for what a merge is given as its base: a Base (its pure weights), or whatever open_source takes."""
    if hasattr(base, "originals") and hasattr(base, "parameters"):
        held = {name: base.originals.get(name, p.detach()) for name, p in base.parameters()}
        buffers = {name: base.originals.get(name, b.detach()) for name, b in base.buffers()}
        return Memory(held | buffers, "the base", frozenset(buffers))
    return open_source(base)


def depth_in(base: Any, names: Iterable[str]) -> Callable[[str], float]:
    """Depth as the base's places know it, where there is a model; else by the names."""
    return (lambda name: base.places.depth_of(name).fraction) if hasattr(base, "places") else depths(names)


def in_memory(method: Blockwise, base: Any, deltas: Sequence[Delta], threads: int | None = None) -> Delta:
    """See Blockwise.merge. Additions and buffers are averaged, whole numbers kept."""
    method.check(len(deltas))
    source = tensors_of(base)
    names = sorted({n for d in deltas for n in d.changes})
    if method.everywhere:
        names = sorted({*names, *(n for n in source.names if not source.is_buffer(n))})
    for name, delta in ((n, d) for d in deltas if not isinstance(d.changes, Lazy) for n in d.changes):
        shape, known = delta.changes[name].weight_shape, source.entry(name).shape
        if shape is not None and shape != known:
            raise UserError(f"shape of {name}", list(shape), f"the base has {list(known)}; merge changes of this base")
    floating = [n for n in names if source.entry(n).dtype.is_floating_point]
    inputs = Held(deltas, source, method.space)
    engine = Engine(method, inputs, threads)
    shapes = {n: source.entry(n).shape for n in floating}
    sites = surveyed(engine, shapes, len(deltas), depth_in(base, source.names))
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
    additions = averaged_additions(deltas, method.shares(len(deltas)))
    changes = lazy if any(isinstance(d.changes, Lazy) for d in deltas) else dict(lazy)
    return Delta(changes, additions, averaged_buffers(source, deltas), {k: v for d in deltas for k, v in d.base.items()})


def averaged_additions(deltas: Sequence[Delta], shares: Sequence[float]) -> dict[str, Addition]:
    """What one model alone brings is kept. What several bring is the mean of its tensors by their shares, where it is one
    module with other numbers: made by one part with the same options (a head for the same classes), of the same shapes."""
    found: dict[str, list[tuple[float, Addition]]] = {}
    for share, delta in zip(shares, deltas, strict=True):
        for name, addition in delta.baked().additions.items():
            found.setdefault(name, []).append((share, addition))
    return {name: _averaged(name, some) for name, some in found.items()}


def _averaged(name: str, some: Sequence[tuple[float, Addition]]) -> Addition:
    first, total = some[0][1], sum(share for share, _ in some)
    if len(some) == 1:
        return first
    form = lambda a: (a.part, dict(a.config), a.strength, {n: t.shape for n, t in a.tensors.items()})
    if total == 0 or any(form(a) != form(first) for _, a in some):
        mend = "several models bring it, and only modules of one part with the same options average; restrict one of them"
        raise UserError("addition", name, mend)
    mean = lambda n: sum(share / total * wide(a.tensors[n]) for share, a in some).to(first.tensors[n].dtype)
    return replace(first, tensors={n: mean(n) for n in first.tensors})


def averaged_buffers(base: Source, deltas: Sequence[Delta]) -> dict[str, Replace]:
    """Statistics: the mean over the models, whole numbers from the first."""
    out = {}
    for name in sorted({n for d in deltas for n in d.buffers}):
        weight = base.read(name)
        values = [d.change(name).apply(weight) if name in d.buffers else weight for d in deltas]
        mean = sum(wide(v) for v in values) / len(values) if weight.is_floating_point() else values[0]
        out[name] = Replace(mean.to(weight.dtype))
    return out


def unrounded(base: Source) -> Source:
    """A source whose tensors can hold a change exactly: in fp32 where it is stored in less."""
    narrow = any(e.dtype.is_floating_point and e.dtype.itemsize < 4 for e in base.entries.values())
    return wider(base) if narrow else base


def settle(
    method: Any, base: Source, deltas: Sequence[Delta], writer: Any, names: Iterable[str], threads: int | None = None
) -> None:
    """Changes of one base merged as `method.merge` does it, and written upon the base: what each of them is (its factors, the
    tensors it names) means the same as in memory. Tensor by tensor; what none changes is copied block by block."""
    exact = unrounded(base)
    merged = method.merge(exact, [d.remap(lambda n: base.aliases.get(n, n)) for d in deltas])
    touched = [n for n in names if n in merged.changes or n in merged.buffers]
    for name in touched:
        value, bare = merged.change(name).apply(exact.read(name)), name.split("/", 1)[1]
        if not finite(value):
            raise UserError(f"values of {bare}", "not all finite", "the base or a change is damaged or far too large")
        writer.write(bare, value.to(writer.entry(bare).dtype))
    stream(Same(), [base], None, writer, sorted({*names} - {*touched}), None, threads)


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

    Buffers are averaged, whole numbers those of the first model.
    """
    method.check(len(models))
    assert base is not None or not method.needs_base, "this method reads the base"
    first = base or models[0]
    names = list(first.names if names is None else names)
    floating = [n for n in names if first.entry(n).dtype.is_floating_point]
    statistics = [n for n in floating if first.is_buffer(n)]
    for how, some in ((method, [n for n in floating if not first.is_buffer(n)]), (Mean(), statistics)):
        engine = Engine(how, Streamed(models, base if how.needs_base else None, how.space), threads)
        sites = surveyed(engine, {n: first.entry(n).shape for n in some}, len(models), depth_of or depths(names))

        def put(b: Block, block: Tensor, how: Blockwise = how) -> None:
            if how.space == "difference":
                block = b.base + block
            name = b.site.name.split("/", 1)[1]
            writer.block(name, b.start, block.to(writer.entry(name).dtype))

        engine.run(sites, put)
    for name in sorted(set(names) - set(floating)):
        bare = name.split("/", 1)[1]
        writer.write(bare, models[0].read(name).to(writer.entry(bare).dtype))
