"""LoRA files of diffusers, written and read: `pipe.load_lora_weights(folder)` gives the same pictures.

    pytorch_lora_weights.safetensors     unet.<module path>.lora_A.weight, .lora_B.weight;  transformer. and text_encoder. alike

A pipeline has several components, which one PEFT adapter cannot hold. The strength is folded into B, so that alpha is the rank
and nothing beside the tensors has to be read. Beside them we write `delta.json`: what it was made on. Read are also the older
names of the factors (lora.down, lora.up), and alphas kept as tensors or in the file's metadata."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from temperament.delta.change import Change, LowRank
from temperament.delta.delta import Delta
from temperament.delta.files import atomic_folder, read_json, write_json
from temperament.delta.lowrank import as_low_rank
from temperament.delta.stream import PIPELINE
from temperament.errors import UserError

FILE, SIDE, FORMAT = "pytorch_lora_weights.safetensors", "delta.json", "temperament.adapter.diffusers"
FOLDERS = {"denoiser": ("unet", "transformer"), "text_encoder": ("text_encoder",)}  # component -> its folder in a pipeline
_NAMES = {"lora_A.weight": "A", "lora.down.weight": "A", "lora_B.weight": "B", "lora.up.weight": "B", "alpha": "alpha"}
_KEY = re.compile(rf"(?P<folder>[^.]+)\.(?P<path>.+?)\.(?P<part>{'|'.join(map(re.escape, _NAMES))})")


def is_diffusers_lora(folder: str | Path) -> bool:
    return (Path(folder) / FILE).is_file()


def write_diffusers_lora(
    delta: Delta, folder: str | Path, *, unet: bool = True, base: str = "", overwrite: bool = False
) -> None:
    """unet: is the denoiser a U-Net, or a transformer? base: the name of what it was made on."""
    tensors: dict[str, Tensor] = {}
    for name, low in _factors(delta).items():
        component, path = name.removesuffix(".weight").split("/", 1)
        start = f"{FOLDERS[component][-1 if not unet else 0]}.{path}"
        B = (low.B * low.scale).reshape(*low.B.shape, *[1] * (low.A.dim() - 2))
        tensors |= {f"{start}.lora_A.weight": low.A, f"{start}.lora_B.weight": B}
    with atomic_folder(Path(folder), overwrite) as new:
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, new / FILE, {"format": "pt"})
        meta = {**delta.meta, "on": base}
        write_json(new / SIDE, {"format": FORMAT, "base": dict(delta.base), "digest": _read(new / FILE).digest, "meta": meta})


def _factors(delta: Delta) -> dict[str, LowRank]:
    if delta.additions or delta.buffers or not delta.changes:
        raise UserError("change", delta.names[:1], "diffusers' LoRA holds low-rank changes only; use --as merged or --as delta")
    found = {}
    for name, change in delta.items():
        low = as_low_rank(change)
        if low is None or low.layout != "linear" or not name.endswith(".weight") or name.split("/", 1)[0] not in FOLDERS:
            mend = "diffusers' LoRA holds low-rank changes of linear maps and convolutions only; use --as merged or --as delta"
            raise UserError("change", name, mend)
        found[name] = low
    return found


def read_diffusers_lora(folder: str | Path) -> Delta:
    folder = Path(folder)
    delta = _read(folder / FILE)
    if not (folder / SIDE).is_file():
        return delta
    side = read_json(folder / SIDE, "adapter")
    if side.get("format") != FORMAT:
        raise UserError("adapter", str(folder / SIDE), "it is of another format; copy the folder again")
    if side.get("digest") != delta.digest:
        raise UserError("adapter", str(folder), "its tensors are not those that were written; export it again")
    return replace(delta, base=dict(side.get("base") or {}), meta=dict(side.get("meta") or {}))


def _read(file: Path) -> Delta:
    modules: dict[str, dict[str, Tensor]] = {}
    folders: dict[str, str] = {}
    with safe_open(file, "pt") as f:
        told = f.metadata() or {}
        for key in f.keys():  # noqa: SIM118
            at = _KEY.fullmatch(key)
            component = at and (PIPELINE.get(at["folder"]) or (at["folder"] if at["folder"] in FOLDERS else None))
            if component is None:
                mend = "it is no LoRA of a denoiser and a text encoder in diffusers' layout; convert it first"
                raise UserError("adapter tensor", key, mend)
            folders[component] = at["folder"]
            modules.setdefault(f"{component}/{at['path']}.weight", {})[_NAMES[at["part"]]] = f.get_tensor(key)
    config = json.loads(told.get("lora_adapter_metadata", "{}"))
    own = {c: {k.removeprefix(f + "."): v for k, v in config.items() if k.startswith(f + ".")} for c, f in folders.items()}
    changes = {name: _change(name, tensors, own[name.split("/", 1)[0]]) for name, tensors in sorted(modules.items())}
    return Delta(changes=changes)


def _change(name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Change:
    """config: PEFT's, of this component, where the file tells it."""
    if not {"A", "B"} <= set(tensors):
        raise UserError("adapter tensor", name, "one of its two factors is missing; copy the file again")
    A, B = tensors["A"], tensors["B"]
    path, rank = name.split("/", 1)[1].removesuffix(".weight"), A.shape[0]
    named = next((a for k, a in config.get("alpha_pattern", {}).items() if re.fullmatch(rf"(.*\.)?({k})", path)), None)
    told = tensors.get("alpha", config.get("lora_alpha", rank) if named is None else named)
    scale = float(told) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank(A, B.flatten(1), scale=scale)
