"""What a user merges: model folders, adapters, deltas, runs, lab bases, hub ids, `model+adapter`; each opened as a streamed source."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from temperament.bases.load import locate
from temperament.delta import Delta, identity, open_source
from temperament.delta.peft_format import is_peft, read_peft
from temperament.delta.stream import Checkpoint, Source
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


def named_base(spec: str) -> str | None:
    """The base a run or an adapter says it was made on."""
    folder = Path(spec)
    for file, keys in (("run.json", ("base", "id")), ("adapter_config.json", ("base_model_name_or_path",))):
        if not (folder / file).is_file():
            continue
        try:
            found = json.loads((folder / file).read_text(encoding="utf-8"))
            for key in keys:
                found = found[key]
        except (OSError, ValueError, KeyError, TypeError):
            mend = "it does not say which base it belongs to; name the base"
            raise UserError("model", str(folder / file), mend) from None
        return str(found) if found else None
    return None


def open_input(spec: str | Path, base: Input | None = None, field: str = "model") -> Input:
    """An Input. base: what deltas and adapters that do not name theirs were made on."""
    spec = str(spec)
    if "+" in spec and not Path(spec).exists():
        model, _, adapter = spec.rpartition("+")
        under = open_input(model, field=field)
        return _on(under, Path(adapter), spec)
    folder = Path(spec).expanduser()
    if (folder / "run.json").is_file():
        inner = folder / "delta"
        if not inner.is_dir():
            raise UserError(field, spec, "this run changed no weights, or is not finished")
        return _on(_under(spec, base, field), inner, spec)
    if is_peft(folder) or (folder / "delta.json").is_file():
        return _on(_under(spec, base, field), folder, spec)
    found = locate(spec, field) or _hub(spec, field)
    if not (found / "config.json").is_file() and not any(found.glob("*.safetensors")):
        raise UserError(field, spec, "it is no model, adapter, delta or run: it has no config.json and no safetensors")
    source: Source = Checkpoint(found, COMPONENT)
    version = spec.partition("@")[2] if spec.startswith("lab/") else ""
    if version:
        source = _version(source, found / "versions" / version / "model.safetensors")
    return Input(spec, source, found, named_base(spec))


def _under(spec: str, base: Input | None, field: str) -> Input:
    named = named_base(spec)
    if base is not None:
        return base
    if named is None:
        raise UserError(field, spec, "it does not say which base it was made on; name the base")
    return open_input(named, field="base")


def _on(under: Input, folder: Path, spec: str) -> Input:
    if not (is_peft(folder) or (folder / "delta.json").is_file()):
        raise UserError("adapter", str(folder), "it is no adapter and no delta")
    delta = read_peft(folder, under.source, COMPONENT) if is_peft(folder) else Delta.load(folder, lazy=True)
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
    dtype = torch.float32 if delta.base and not is_peft(folder) or (folder.parent / "run.json").is_file() else max(sizes, key=sizes.get)
    return Input(spec, tuned(under.source, delta, spec), under.folder, under.spec, delta, dtype)


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
