"""A delta on disk: `delta.safetensors` (the tensors) and `delta.json` (all else, and the sha256 of every tensor)."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from temperament.delta.change import Change
from temperament.delta.delta import Addition, Delta, Lazy
from temperament.delta.files import atomic_folder, read_json, write_json
from temperament.delta.hash import tensor_sha
from temperament.delta.stream import Checkpoint
from temperament.delta.tensorfile import Entry, Writer
from temperament.errors import UserError

FORMAT, VERSION = "temperament.delta", 1


def save(delta: Delta, folder: str | Path, overwrite: bool = False) -> None:
    """Write in two passes, so that a lazy delta is never held whole."""
    table, sections, shas = {}, {"changes": {}, "buffers": {}, "additions": {}}, {}
    for section, name, config, tensors in delta.entries():
        sections[section + "s"][name] = config
        table |= {f"{section}:{name}:{key}": Entry(t.dtype, tuple(t.shape)) for key, t in tensors.items()}
    with atomic_folder(folder, overwrite) as new:
        with Writer(new, table, "delta", metadata={"format": "pt"}) as writer:
            for key, tensor in delta.tensors():
                writer.write(key, tensor)
                shas[key] = tensor_sha(tensor)
        card = {"format": FORMAT, "version": VERSION, "base": dict(delta.base), "strength": delta.strength}
        write_json(new / "delta.json", card | {"meta": dict(delta.meta), "sha256": shas} | sections)


def load(folder: str | Path, lazy: bool = False) -> Delta:
    """UserError names the file and the mend when anything is missing, cut or altered."""
    folder = Path(folder)
    card = read_json(folder / "delta.json", "delta")

    def refuse(what: object, why: str) -> UserError:
        return UserError("delta", str(what), why)

    if card.get("format") != FORMAT or card.get("version") != VERSION:
        raise refuse(folder / "delta.json", f"it is not a {FORMAT} of version {VERSION}; save it again with this version")
    sections = [card.get(key) for key in ("changes", "additions", "buffers", "sha256", "base", "meta")]
    if not all(isinstance(section, dict) for section in sections):
        raise refuse(folder / "delta.json", "a section is missing; it was edited or cut, save it again")
    changes, additions, buffers, shas, base, meta = sections
    if any("/" not in str(name) for name in (*changes, *additions, *buffers)):
        raise refuse(folder / "delta.json", "a name is not component/parameter; it was edited, save it again")
    source = _files(folder, shas)
    keys: dict[str, dict[str, str]] = {}
    for key in shas:
        section, _, rest = key.partition(":")
        name, _, inner = rest.rpartition(":")
        keys.setdefault(f"{section}:{name}", {})[inner] = key

    def read(key: str) -> Tensor:
        tensor = source.read(f"delta/{key}")
        if tensor_sha(tensor) != shas[key]:
            why = f"tensor {key!r} is not the one that was saved; copy the delta again"
            raise refuse(source.entry(f"delta/{key}").file, why)
        return tensor

    def tensors(section: str, name: str) -> dict[str, Tensor]:
        return {inner: read(key) for inner, key in keys.get(f"{section}:{name}", {}).items()}

    def addition(name: str) -> Addition:
        try:
            return Addition(**additions[name], tensors=tensors("addition", name))
        except TypeError:
            raise refuse(folder / "delta.json", f"addition {name!r} was edited; save it again") from None

    def lazily(section: str, configs: dict) -> Lazy:
        return Lazy(configs, lambda name: Change.read(configs[name], tensors(section, name)))

    strength = card.get("strength")
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise refuse(folder / "delta.json", "strength must be a finite number; save it again")
    made = lazily("change", changes), lazily("buffer", buffers)
    return Delta(
        changes=made[0] if lazy else dict(made[0]),
        additions={name: addition(name) for name in additions},
        buffers=made[1] if lazy else dict(made[1]),
        base=base,
        strength=strength,
        meta=meta,
    )


def _files(folder: Path, shas: dict) -> Checkpoint:
    """The tensor files, holding exactly the recorded keys."""
    if shas and not any(folder.glob("delta*.safetensors")):
        raise UserError("delta", str(folder / "delta.safetensors"), "it is missing; copy the delta again")
    at = folder / "delta.safetensors"
    source = Checkpoint(at if at.is_file() else folder, "delta")
    found = {name.split("/", 1)[1] for name in source.entries}
    if found != set(shas):
        odd = sorted(found ^ set(shas))[0]
        raise UserError("delta", str(folder), f"delta.json and the tensors disagree on {odd!r}; copy the delta again")
    return source
