"""Another face of a checkpoint: tensors renamed, some made on access; what a merge reads where files alone will not do."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from temperament.delta.delta import Delta
from temperament.delta.stream import Source
from temperament.delta.tensorfile import Entry
from temperament.errors import UserError, nearest

KEPT = 2  # tensors made and kept for the blocks that follow


class View(Source):
    """names: {name here: name in the source}; made: {name: (dtype and shape, how)}, which win. Without names: those of the source."""

    def __init__(
        self,
        source: Source,
        names: Mapping[str, str] | None = None,
        made: Mapping[str, tuple[Entry, Callable[[], Tensor]]] | None = None,
        label: str | None = None,
    ):
        self.source, self.made, self.label = source, dict(made or {}), label or source.label
        self.names_there = {n: n for n in source.names} if names is None else dict(names)
        found = {here: source.entry(there) for here, there in self.names_there.items() if here not in self.made}
        self.entries = found | {name: entry for name, (entry, _) in self.made.items()}
        self.aliases = {a: n for a, n in source.aliases.items() if n in self.entries} if names is None else {}
        self._lock, self._held = threading.Lock(), OrderedDict()

    def is_buffer(self, name):
        return self.source.is_buffer(self.names_there[name]) if name in self.names_there else super().is_buffer(name)

    def block(self, name, start, stop, out=None):
        name = self.aliases.get(name, name)
        if name not in self.made:
            self.entry(name)
            return self.source.block(self.names_there[name], start, stop, out)
        tensor = self._whole(name).reshape(-1)[start:stop]
        out = torch.empty(stop - start, dtype=tensor.dtype) if out is None else out.view(-1)[: stop - start]
        return out.copy_(tensor)

    def _whole(self, name: str) -> Tensor:
        with self._lock:
            if name not in self._held:
                while len(self._held) >= KEPT:
                    self._held.popitem(last=False)
                self._held[name] = self.made[name][1]().detach()
            self._held.move_to_end(name)
            return self._held[name]

    def close(self):
        self._held.clear()
        self.source.close()


def tuned(source: Source, delta: Delta, label: str | None = None) -> View:
    """source + delta, made tensor by tensor; what changes is fp32, so that nothing is rounded before it is merged."""
    if any(a.ship for a in delta.additions.values()):
        raise UserError("delta", min(delta.additions), "it adds a module; only changes of weights can be merged into others")
    made = {}
    for name in (*delta.changes, *delta.buffers):
        if name not in source:
            raise UserError("parameter", name, f"{source.label} has no such tensor; {nearest(name, source.entries)}")
        at = source.aliases.get(name, name)
        entry = source.entry(at)
        if entry.dtype.is_floating_point and entry.dtype.itemsize < 4:
            entry = Entry(torch.float32, entry.shape)
        made[at] = (entry, lambda name=name, at=at, to=entry.dtype: delta.change(name).apply(source.read(at).to(to)))
    return View(source, made=made, label=label)


def wide(source: Source) -> View:
    """The same in fp32."""
    floating = [n for n in source.names if source.entry(n).dtype.is_floating_point]
    entries = {n: Entry(torch.float32, source.entry(n).shape) for n in floating}
    return View(source, made={n: (entries[n], lambda n=n: source.read(n).float()) for n in floating})
