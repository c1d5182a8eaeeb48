"""What a user merges: model folders, adapters, deltas, runs, lab bases, hub ids, `model+adapter`; each opened as a streamed
source."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from temperament.bases.kept import kept
from temperament.bases.load import locate
from temperament.bases.pipeline import is_pipeline
from temperament.delta import Change, Delta, Lazy, identity, open_source
from temperament.delta.peft_format import is_peft, read_peft
from temperament.delta.stream import Checkpoint, Source, finite
from temperament.delta.tensorfile import read_header
from temperament.delta.views import View, tuned, wide
from temperament.errors import UserError

COMPONENT = "lm"  # every source goes by one component: names are those of the files
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # of a hub repository; never pickles or code


@dataclass(frozen=True)
class Input:
    """spec as it was named; source its tensors; folder its config and tokenizer; base what it says it was tuned from."""

    spec: str
    source: Source
    folder: Path
    base: str | None = None
    delta: Delta | None = None  # where it is one on `base`
    dtype: torch.dtype | None = None  # of what is made from it, where that is not how it is stored

    @property
    def config(self) -> dict:
        path = self.folder / "config.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def change_of(self, base: Input) -> Delta | None:
        """What it changes in `base`; None where it is no change, or one of another base."""
        return self.delta if self.base is not None and same_place(self.base, base.spec) else None


def same_place(one: str, other: str) -> bool:
    """Do two names mean one folder or id?"""
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def named_base(spec: str) -> str | None:
    """The base that a run, an adapter or a delta says it was made on."""
    folder = Path(spec).expanduser()
    found = kept(folder) if folder.is_dir() else None
    return found.base if found else None


def open_input(spec: str | Path, base: Input | None = None, field: str = "model") -> Input:
    """An Input. base: what deltas and adapters that do not name theirs were made on."""
    spec = str(spec)
    if "+" in spec and not Path(spec).exists():
        model, _, adapter = spec.rpartition("+")
        under = open_input(model, field=field)
        return _on(under, Path(adapter), spec)
    folder = locate(spec, field) or _hub(spec, field)
    if is_pipeline(folder):
        mend = "it is a pipeline of diffusers; tune on it in a recipe and merge its steps there, in a merge step"
        raise UserError(field, spec, mend)
    found = kept(folder, field)
    if found is not None and spec.startswith("lab/"):  # a base of its own, kept as what differs from another
        made = _on(open_input(found.named(field, spec), field=field), folder, spec)
        return replace(made, folder=folder, base=None, delta=None)
    if found is not None and found.delta is None:
        raise UserError(field, spec, "this run changed no weights")
    if found is not None:
        if base is not None and found.base is not None:
            _same_base(spec, found.base, base)
        return _on(base or open_input(found.named(field, spec), field="base"), found.delta, spec, found.run is not None)
    if not (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
        raise UserError(field, spec, "it is no model, adapter, delta or run: it has no config.json and no safetensors")
    source: Source = Checkpoint(folder, COMPONENT)
    version = spec.partition("@")[2] if spec.startswith("lab/") else ""
    if version:
        source = _version(source, folder / "versions" / version / "model.safetensors")
    return Input(spec, source, folder)


def _same_base(spec: str, named: str, base: Input) -> None:
    """Refuse a base that is known to be another than the one a change names: other tensors where both are here, else another
    name of the hub. A folder that is not here (it may lie where the change was made) tells nothing."""
    if same_place(named, base.spec):
        return
    path = Path(named).expanduser()
    if named.startswith("lab/") or path.is_dir():
        other = open_input(named, field="base").source
        both = [[*identity(source).values(), *identity(wide(source)).values()] for source in (other, base.source)]
        differs = not {*both[0]} & {*both[1]}
    else:
        ids = [n for n in (named, base.spec) if n.count("/") == 1 and not n.startswith((".", "/", "~", "lab/"))]
        differs = len(ids) == 2 and not Path(base.spec).is_dir() and _last(named) != _last(base.spec)
    if differs:
        mend = f"it was made on {named}; name that as the base, or merge {base.spec}+{spec} to put it on this one all the same"
        raise UserError(f"the base of {spec}", base.spec, mend)


def _last(name: str) -> str:
    return name.partition("@")[0].rsplit("/", 1)[-1].lower()


def _on(under: Input, folder: Path, spec: str, measured: bool = False) -> Input:
    """The change in a folder on its base. measured: it is of a run."""
    if not (is_peft(folder) or (folder / "delta.json").is_file()):
        raise UserError("adapter", str(folder), "it is no adapter and no delta")
    delta = read_peft(folder, under.source, COMPONENT) if is_peft(folder) else Delta.load(folder, lazy=True)
    delta = _sound(delta, spec)
    recorded = set(delta.base.values())
    if len(delta.components) > 1:
        raise UserError("model", spec, f"it changes several components ({', '.join(delta.components)}); merge one at a time")
    if recorded and not recorded & {*identity(under.source).values(), *identity(wide(under.source)).values()}:
        mend = f"it was made on another base than {under.spec} ({min(recorded)[:12]}); name its own base"
        raise UserError("model", spec, mend)
    delta = delta.remap(lambda name: f"{COMPONENT}/{name.split('/', 1)[1]}")
    # a run's weights are fp32, as they were measured; an adapter's result is stored as its base is
    sizes = Counter({d: 0 for d in (torch.float32,)})
    for entry in under.source.entries.values():
        sizes[entry.dtype] += entry.numel if entry.dtype.is_floating_point else 0
    exact = measured or (delta.base and not is_peft(folder))
    dtype = torch.float32 if exact else max(sizes, key=sizes.get)
    return Input(spec, tuned(under.source, delta, spec), under.folder, under.spec, delta, dtype)


def _sound(delta: Delta, spec: str) -> Delta:
    """The delta, all of whose numbers are finite; read lazily they are looked at when they are read."""

    def looked(name: str, change: Change) -> Change:
        for key, tensor in change.tensors().items():
            if not finite(tensor):
                mend = f"not all of its {key} is finite; {spec} is damaged or its training diverged; use another"
                raise UserError(f"a tensor of {spec}", name.split("/", 1)[1], mend)
        return change

    def sound(held: Mapping[str, Change]) -> Mapping[str, Change]:
        lazy = Lazy(held, lambda name: looked(name, held[name]))
        return lazy if isinstance(held, Lazy) else dict(lazy)

    return replace(delta, changes=sound(delta.changes), buffers=sound(delta.buffers))


def _version(source: Source, file: Path) -> View:
    entries = read_header(file, COMPONENT)
    other = open_source(file, COMPONENT)
    made = {}
    for name in entries:
        if name in source:
            at = source.aliases.get(name, name)
            made[at] = (source.entry(at), lambda name=name, at=at: other.read(name).to(source.entry(at).dtype))
    return View(source, made=made)


def _hub(spec: str, field: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(spec, allow_patterns=WANTED))
    except Exception as problem:
        first = str(problem).strip().split("\n")[0][:160]
        mend = f"it is no folder here and could not be fetched ({first}); name a folder or a reachable Hugging Face id"
        raise UserError(field, spec, mend) from None
