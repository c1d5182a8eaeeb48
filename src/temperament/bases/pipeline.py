"""Pipelines: a folder or an id in the layout of diffusers, as the components and processors of a base.

    model_index.json        {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": [...], ...}
    unet/ text_encoder/     each a folder of its own, config.json and safetensors

    denoiser      the U-Net or the transformer        codec           the autoencoder, where pictures are made in its latents
    text_encoder  what reads the caption              tokenizer, scheduler, image: processors

Nothing but safetensors is read. A safety checker and a feature extractor are left where they are: they neither train nor
make pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from temperament.delta import identity
from temperament.delta.stream import PIPELINE
from temperament.errors import UserError

COMPONENTS = PIPELINE | {"text_encoder": "text_encoder"}
LEFT = ("safety_checker", "feature_extractor", "image_encoder")
LIBRARIES = ("diffusers", "transformers")


def is_pipeline(folder: Path | None) -> bool:
    return folder is not None and (folder / "model_index.json").is_file()


def pipeline_of(spec: str, folder: Path | None, field: str) -> Path | None:
    """The folder of the pipeline a base names, fetched where it is an id of the hub; None where it is no pipeline."""
    return folder if is_pipeline(folder) else fetched(spec, field) if folder is None else None


def fetched(spec: str, field: str) -> Path | None:
    """The local copy of a pipeline on the hub, or None where that id is no pipeline."""
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        hf_hub_download(spec, "model_index.json")
    except Exception:  # no such file, no such repository or no network: the loader that is tried next says which
        return None
    try:
        return Path(
            snapshot_download(spec, allow_patterns=["*.json", "*.txt", "*/*.json", "*/*.txt", "*/*.safetensors", "*/*.model"])
        )
    except Exception as problem:
        raise UserError(field, spec, f"it could not be fetched ({str(problem).splitlines()[0][:160]})") from None


def read_pipeline(
    folder: Path, spec: str, dtype: torch.dtype, field: str
) -> tuple[dict[str, nn.Module], dict[str, Any], dict[str, str]]:
    """(components, the denoiser first; processors; sha256 of each component)."""
    sha256: dict[str, str] = {}

    def weights(sub: Path, library: str, cls: str, component: str) -> nn.Module:
        sha256.update(identity(sub, component))
        return _module(sub, library, cls, spec, dtype, field)

    modules, processors = _read(folder, spec, field, weights)
    return modules, processors, sha256


def shells(folder: Path, spec: str, dtype: torch.dtype, field: str) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """The same modules from their configurations alone, with weights of no meaning."""
    return _read(folder, spec, field, lambda sub, library, cls, component: _shell(sub, library, cls, spec, dtype, field))


def _read(folder: Path, spec: str, field: str, made: Callable[..., nn.Module]) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """(components, the denoiser first; processors), each component as `made` makes it of its folder, library and class."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except ValueError:
        raise UserError(field, spec, "its model_index.json is no JSON; copy the folder again") from None
    named = {n: v for n, v in index.items() if isinstance(v, list) and len(v) == 2 and v[0] and n not in LEFT}
    unknown = [n for n in named if n not in COMPONENTS and n not in ("scheduler", "tokenizer")]
    if unknown or not any(COMPONENTS.get(n) == "denoiser" for n in named):
        what = f"of its parts {', '.join(unknown)} cannot be used" if unknown else "it names no unet and no transformer"
        raise UserError(
            field, spec, f"{what}; use a pipeline of one denoiser and one text encoder, e.g. Stable Diffusion 1 or 2"
        )
    modules: dict[str, nn.Module] = {}
    processors: dict[str, Any] = {"pipeline": folder}
    for name, (library, cls) in named.items():
        sub = folder / name
        if not sub.is_dir():
            raise UserError(field, spec, f"its part {name} is missing; copy the folder again")
        if name == "scheduler":
            processors["scheduler"] = json.loads((sub / "scheduler_config.json").read_text())
        elif name == "tokenizer":
            processors["tokenizer"] = _tokenizer(sub, spec, field)
        else:
            component = COMPONENTS[name]
            modules[component] = made(sub, library, cls, component).requires_grad_(component != "codec")  # it never trains
    order = sorted(modules, key=lambda n: n != "denoiser")
    return {n: modules[n].eval() for n in order}, processors


def _class(folder: Path, library: str, cls: str, spec: str, field: str) -> type:
    import importlib

    if library not in LIBRARIES:
        raise UserError(field, spec, f"{folder.name} is of {library!r}, and code of a model folder is not run")
    kind = getattr(importlib.import_module(library), cls, None)
    if kind is None:
        raise UserError(field, spec, f"this version of {library} has no {cls}; update it, or use another base")
    return kind


def _shell(folder: Path, library: str, cls: str, spec: str, dtype: torch.dtype, field: str) -> nn.Module:
    kind = _class(folder, library, cls, spec, field)
    if library == "diffusers":
        return kind.from_config(kind.load_config(folder)).to(dtype)
    return kind(kind.config_class.from_pretrained(folder)).to(dtype)


def _module(folder: Path, library: str, cls: str, spec: str, dtype: torch.dtype, field: str) -> nn.Module:
    kind = _class(folder, library, cls, spec, field)
    if not any(folder.glob("*.safetensors")):
        raise UserError(field, spec, f"{folder.name} holds no .safetensors; pickles are never loaded")
    try:
        more = {"use_safetensors": True, "local_files_only": True}
        return kind.from_pretrained(folder, **more, **{"torch_dtype" if library == "diffusers" else "dtype": dtype})
    except Exception as problem:
        first = str(problem).strip().splitlines()[0][:160]
        raise UserError(field, spec, f"its part {folder.name} could not be loaded ({first})") from None


def _tokenizer(folder: Path, spec: str, field: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as problem:
        raise UserError(field, spec, f"its tokenizer could not be read ({str(problem).splitlines()[0][:160]})") from None


def write_pipeline(base: Any, folder: Path) -> None:
    """The base's modules as they stand, in the layout of diffusers; index and processors are those it was read with."""
    import shutil

    like = base.processors.get("pipeline")
    if like is None or not (like / "model_index.json").is_file():
        raise UserError("base", base.id, "the folder it was read from is gone, and with it tokenizer and scheduler; restore it")
    folder.mkdir(parents=True, exist_ok=True)
    index = json.loads((like / "model_index.json").read_text())
    for name, value in index.items():
        component = COMPONENTS.get(name)
        if component in base.components and isinstance(value, list) and value[0]:
            base.components[component].save_pretrained(folder / name, safe_serialization=True)
        elif isinstance(value, list) and value[0] and (like / name).is_dir():
            shutil.copytree(like / name, folder / name, dirs_exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
