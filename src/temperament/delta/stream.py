"""Checkpoints read by name and by block, without loading them: a folder, a pipeline folder, one file, a module, tensors.

Names are `component/parameter`. Every source has the same face: `names`, `entry(name)` (dtype, shape), `aliases` (tied names),
`read(name, out)` and `block(name, start, stop, out)` (flat elements). Files are read by `pread` into buffers the caller may
reuse: safe from many threads, and nothing grows with the model, as the pages of a memory map would.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from temperament.delta.files import read_json, safe_name
from temperament.delta.tensorfile import PICKLES, Entry, raw, read_header
from temperament.errors import UserError, nearest

PIPELINE = {"unet": "denoiser", "transformer": "denoiser", "vae": "codec"}  # diffusers folder -> our name; others keep theirs
WEIGHTS = ("model", "diffusion_pytorch_model")  # stems looked for in a folder
BLOCK = 1 << 20  # elements


def find_weights(folder: Path, component: str) -> dict[str, Entry]:
    """Entries of a folder with one safetensors file, or shards and their index. Pickles alone are refused."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    single = [path for stem in WEIGHTS if (path := folder / f"{stem}.safetensors").is_file()]
    if single:
        return read_header(single[0], component)
    if (folder / "adapter_config.json").is_file() and not indexes:
        raise UserError("checkpoint", str(folder), "it is an adapter, not a model; load it as a delta on its base")
    if not indexes:
        lone = sorted(folder.glob("*.safetensors"))
        if len(lone) == 1:
            return read_header(lone[0], component)
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles and not lone:
            mend = f"it holds only pickles ({pickles[0]}), which are never loaded; save it as safetensors"
            raise UserError("checkpoint", str(folder), mend)
        raise UserError("checkpoint", str(folder), "it needs model.safetensors, or shards with model.safetensors.index.json")
    at = next((i for stem in WEIGHTS for i in indexes if i.name.startswith(stem + ".")), indexes[0])
    where = read_json(at, "checkpoint index").get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError("checkpoint index", str(at), "it has no weight_map; write the checkpoint again")
    files = sorted(safe_name(shard, "shard name") for shard in dict.fromkeys(map(str, where.values())))
    shards = {file: read_header(folder / file, component) for file in files}
    found = {}
    for name, shard in where.items():
        if (full := f"{component}/{name}") not in shards[shard]:
            raise UserError("checkpoint file", str(folder / shard), f"tensor {name!r} of the index is not in it; copy it again")
        found[full] = shards[shard][full]
    return found


class Source:
    """The face all sources share; see the module's text."""

    entries: dict[str, Entry]
    aliases: dict[str, str]
    label: str

    @property
    def names(self) -> list[str]:
        """Distinct tensors in name order; a tied name is in `aliases` alone."""
        return sorted(self.entries)

    @property
    def components(self) -> list[str]:
        return sorted({name.split("/", 1)[0] for name in self.entries})

    def is_buffer(self, name: str) -> bool:
        """On disk a buffer looks like a parameter; running statistics and integers are told by their names and dtypes."""
        return name.endswith(("running_mean", "running_var")) or not self.entry(name).dtype.is_floating_point

    def __contains__(self, name: str) -> bool:
        return name in self.entries or name in self.aliases

    def entry(self, name: str) -> Entry:
        name = self.aliases.get(name, name)
        if name not in self.entries:
            raise UserError("tensor", name, f"{self.label} has no such tensor; {nearest(name, self.entries)}")
        return self.entries[name]

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """The whole tensor; into `out` (any buffer of at least its elements and of its dtype) when given."""
        entry = self.entry(name)
        return self.block(name, 0, entry.numel, out).view(entry.shape)

    __getitem__ = lambda self, name: self.read(name)  # so that a source serves where a dict of tensors does

    def block(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Flat elements start..stop."""
        raise NotImplementedError

    def blocks(self, name: str, size: int = BLOCK) -> Iterator[tuple[int, int]]:
        """(start, stop) over the elements of a tensor."""
        numel = self.entry(name).numel
        return ((start, min(start + size, numel)) for start in range(0, numel, size))

    def close(self) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Checkpoint(Source):
    """Safetensors on disk: a model folder, a pipeline folder (a component for each sub-folder it indexes), or one file."""

    def __init__(self, path: str | Path, component: str = "lm"):
        self.path, self.label, self._files = Path(path), str(path), {}
        if self.path.is_file():
            if self.path.suffix in PICKLES:
                raise UserError("checkpoint file", str(path), "it is a pickle and is never loaded; save it as safetensors")
            self.entries = read_header(self.path, component)
        elif (self.path / "model_index.json").is_file():
            parts = read_json(self.path / "model_index.json", "pipeline index")
            folders = [name for name in sorted(parts) if not name.startswith("_") and self._has_weights(name)]
            self.entries = {k: v for f in folders for k, v in find_weights(self.path / f, PIPELINE.get(f, f)).items()}
        elif self.path.is_dir():
            self.entries = find_weights(self.path, component)
        else:
            raise UserError("checkpoint", str(path), "there is no such file or folder")
        self.aliases = self._tied(component)
        for alias in self.aliases:
            del self.entries[alias]

    def _has_weights(self, name: str) -> bool:
        folder = self.path / safe_name(name, "pipeline component")
        return folder.is_dir() and any(p.suffix == ".safetensors" or p.suffix in PICKLES for p in folder.iterdir())

    def _tied(self, component: str) -> dict[str, str]:
        """Older files store a tied output head twice. Where the config says tied and the bytes agree, it is one tensor."""
        config = self.path / "config.json"
        if not config.is_file() or not read_json(config, "model config").get("tie_word_embeddings"):
            return {}
        inputs = ("embed_tokens.weight", "wte.weight", "shared.weight", "word_embeddings.weight")
        head = f"{component}/lm_head.weight"
        found = [name for name in self.entries if name.endswith(inputs) and name != head]
        if head not in self.entries or len(found) != 1 or self.entries[head].shape != self.entries[found[0]].shape:
            return {}
        self.aliases = {}
        same = all(torch.equal(self.block(head, *at), self.block(found[0], *at)) for at in self.blocks(head))
        return {head: found[0]} if same else {}

    def block(self, name, start, stop, out=None):
        entry = self.entry(name)
        out = torch.empty(stop - start, dtype=entry.dtype) if out is None else out.view(-1)[: stop - start]
        assert out.dtype == entry.dtype and 0 <= start <= stop <= entry.numel
        view, at = raw(out), entry.start + start * entry.dtype.itemsize
        while len(view):
            got = os.preadv(self._descriptor(entry.file), [view], at)  # at most 2 GiB a call
            if got == 0:
                raise UserError("checkpoint file", str(entry.file), "it became shorter while it was read; copy it again")
            view, at = view[got:], at + got
        return out

    def _descriptor(self, path: Path) -> int:
        if path not in self._files:
            self._files.setdefault(path, path.open("rb", buffering=0))  # atomic: two threads agree on one file
        return self._files[path].fileno()

    def close(self):
        while self._files:
            self._files.popitem()[1].close()


def storage(tensor: Tensor) -> tuple:
    """Equal for tied tensors: the same elements of the same memory."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


class Memory(Source):
    """Tensors in memory, by full name. Names that share storage are one tensor, called by the first (as modules do)."""

    def __init__(self, tensors: Mapping[str, Tensor], label="the model in memory", buffers: frozenset[str] = frozenset()):
        self.label, self.buffers, self._tensors, self.aliases = label, buffers, {}, {}
        first: dict[tuple, str] = {}
        for name, tensor in tensors.items():
            if tensor.numel() and first.setdefault(storage(tensor), name) != name:
                self.aliases[name] = first[storage(tensor)]
            else:
                self._tensors[name] = tensor.detach()
        self.entries = {name: Entry(t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}

    def is_buffer(self, name):
        return name in self.buffers or super().is_buffer(name)

    def block(self, name, start, stop, out=None):
        tensor = self._tensors[self.aliases.get(name, name)].reshape(-1)[start:stop]
        out = torch.empty(stop - start, dtype=tensor.dtype) if out is None else out.view(-1)[: stop - start]
        return out.copy_(tensor)  # a copy: what is read must not follow a model that is trained on


def of_module(modules: Mapping[str, nn.Module]) -> Memory:
    """Parameters and persistent buffers of the modules, by component."""
    tensors, buffers = {}, set()
    for component, module in modules.items():
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        for name, tensor in module.state_dict(keep_vars=True).items():
            tensors[f"{component}/{name}"] = tensor
            if name not in parameters:
                buffers.add(f"{component}/{name}")
    return Memory(tensors, buffers=frozenset(buffers))


def open_source(what, component: str = "lm") -> Source:
    """A Source for a path, a module, {component: module}, or {name: tensor} (bare names get `component/` before them)."""
    if isinstance(what, Source):
        return what
    if isinstance(what, str | os.PathLike):
        return Checkpoint(Path(what), component)
    if isinstance(what, nn.Module):
        return of_module({component: what})
    assert isinstance(what, Mapping), f"not a checkpoint, module or mapping: {type(what)}"
    if what and all(isinstance(value, nn.Module) for value in what.values()):
        return of_module(what)
    return Memory({name if "/" in name else f"{component}/{name}": t for name, t in what.items()}, "the tensors in memory")


def finite(tensor: Tensor) -> bool:
    """No NaN or infinity. A finite sum proves it in one pass; only a sum that is not finite is looked at again."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return bool(tensor.sum(dtype=dtype).isfinite()) or bool(tensor.to(dtype).isfinite().all())


