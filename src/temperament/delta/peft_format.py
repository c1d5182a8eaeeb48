"""PEFT adapter directories, read: LoRA as peft computes it (rsLoRA, DoRA, patterns, Conv1D, embeddings, convolutions).

    adapter_config.json, adapter_model.safetensors     keys base_model.model.<module path>.lora_A.weight ...
    scale = alpha / r, or alpha / sqrt(r) with use_rslora;   r and alpha by module where a pattern names it

Beside them we write `delta.json` (the sha256 of the base and of the tensors): in the config peft would drop it with a warning.
An adapter config comes from strangers: names and numbers are read from it, nothing is imported or run.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from temperament.delta.change import Change, Dense, Layout, LowRank
from temperament.delta.delta import Delta
from temperament.delta.files import read_json
from temperament.delta.on_weight import Renormalised, Replace
from temperament.delta.stream import Checkpoint, Source, open_source
from temperament.errors import UserError

PREFIX = "base_model.model."
SIDE, FORMAT = "delta.json", "temperament.adapter"
PARTS = r"lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector(?:\.weight)?"
_KEY = re.compile(rf"(?P<path>.+)\.(?P<part>{PARTS})\Z")
# options that make the change more, or other, than scale * B A on the base as it is
_UNREADABLE = ("target_parameters", "trainable_token_indices", "alora_invocation_tokens", "layer_replication", "use_bdlora")
_MOVES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initialisations that took weight out of the base


def is_peft(folder) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


def read_peft(folder: str | Path, base=None, component: str | None = None) -> Delta:
    """The adapter as a Delta on `component` (by default the one it was written for, else "lm").

    base (a path, module or Source), where given, settles how weights are stored and refuses what tied weights cannot express;
    its identity is not computed here (`Delta.check_base` compares). UserError: not LoRA, an option with no equal here, damaged
    files, tensors changed since temperament wrote them.
    """
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json", "adapter config")
    _refuse_unreadable(config, folder)
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError("adapter", str(folder / "adapter_model.bin"), "it is a pickle, never loaded; save it as safetensors")
    side = _side_file(folder)
    component = component or str(side.get("component", "lm"))
    source = Checkpoint(weights, "adapter")
    base = None if base is None else open_source(base, component)
    modules: dict[str, dict[str, Tensor]] = {}
    changes: dict[str, Change] = {}
    for name in source.names:
        key = name.split("/", 1)[1]
        if not key.startswith(PREFIX):
            raise UserError("adapter tensor", key, f"keys of a PEFT adapter begin with {PREFIX!r}; convert it first")
        key = key.removeprefix(PREFIX)
        if found := _KEY.match(key):
            modules.setdefault(found["path"], {})[found["part"]] = source.read(name)
        elif not key.endswith(".base_layer.weight") and key not in side.get("tied", []):
            # (neither the frozen weight under a LoRA, which peft saves for embeddings, nor a tied tensor's second name)
            changes[f"{component}/{key.replace('.base_layer.', '.')}"] = Replace(source.read(name))  # modules_to_save, biases
    for path, tensors in sorted(modules.items()):
        weight = f"{component}/{path}.weight"
        changes[weight], bias = _lora(path, tensors, config, base, weight)
        if bias is not None:
            changes[f"{component}/{path}.bias"] = bias
    changes = _tied_once(changes)
    delta = Delta(changes, base=side.get("base", {}), meta=side.get("meta", {}))
    if side and side.get("digest") != delta.digest:
        mend = f"its tensors are not those that were saved; copy it again, or delete {SIDE} if you trained it on"
        raise UserError("adapter", str(weights), mend)
    if base is not None:
        changes = {n: c for n, c in changes.items() if not (isinstance(c, Replace) and _unchanged(c, base, n))}
        changes = {n: c for n, c in changes.items() if not _copied(n, changes, base)}
        if not config.get("ensure_weight_tying"):
            _refuse_half_tied(changes, base)
    return replace(delta, changes=changes)


def _side_file(folder: Path) -> dict:
    side = read_json(folder / SIDE, "adapter side file") if (folder / SIDE).is_file() else {}
    known = side.get("format") == FORMAT and isinstance(side.get("base"), dict) and isinstance(side.get("tied", []), list)
    if side and not known:
        raise UserError("adapter side file", str(folder / SIDE), "it was edited; delete it to load without a base check")
    return side


def _refuse_unreadable(config: dict, folder: Path) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        raise UserError("peft_type", kind, f"only LORA adapters are read so far ({folder.name}); merge it with peft first")
    for option in _UNREADABLE:
        if config.get(option):
            raise UserError(option, config[option], "this LoRA variant has no equal here; merge it with peft first")
    if str(config.get("init_lora_weights")).startswith(_MOVES_BASE):
        mend = "it was trained on a changed base; save it with peft's path_initial_model_for_weight_conversion"
        raise UserError("init_lora_weights", config["init_lora_weights"], mend)


def pattern_value(patterns: object, path: str, default: object) -> float:
    """The number of the first pattern that matches the path or its end (peft's rule), else the default."""
    for pattern, value in (patterns if isinstance(patterns, dict) else {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                default = value
                break
        except re.error:
            raise UserError("rank_pattern or alpha_pattern", pattern, "it is not a regular expression") from None
    if isinstance(default, bool) or not isinstance(default, int | float) or not math.isfinite(default):
        raise UserError("lora_alpha", default, f"it must be a number for {path}")
    return default


def _lora(path: str, tensors: dict, config: dict, base: Source | None, weight: str) -> tuple[Change, Change | None]:
    """The changes of one module's weight and, with lora_bias, its bias."""
    embedding = "lora_embedding_A" in tensors
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    if any(name not in tensors for name in names):
        raise UserError("adapter module", path, f"it needs {names[0]} and {names[1]}; copy the adapter again")
    A, B = (tensors[name] for name in names)
    if A.dim() < 2 or B.shape[1:].numel() != A.shape[0]:
        mend = f"A {list(A.shape)} and B {list(B.shape)} do not share a rank; copy the adapter again"
        raise UserError("adapter module", path, mend)
    rank = A.shape[0]
    alpha = pattern_value(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    layout: Layout = "embedding" if embedding else "conv1d" if config.get("fan_in_fan_out") and A.dim() == 2 else "linear"
    change = LowRank(A, B.flatten(1), layout, scale=scale)
    if base is not None:
        change = _settled(change, base, weight)
    bias = Dense(tensors["lora_B.bias"], scale=scale) if "lora_B.bias" in tensors else None
    magnitude = next((t for name, t in tensors.items() if name.startswith("lora_magnitude_vector")), None)
    if config.get("use_dora") and magnitude is None:
        raise UserError("adapter module", path, "DoRA needs lora_magnitude_vector; copy the adapter again")
    return (change if magnitude is None else Renormalised(change, magnitude.flatten(), change.layout)), bias


def _settled(change: LowRank, base: Source, weight: str) -> LowRank:
    """peft keeps one fan_in_fan_out for all modules; the shape in the base says how this one is stored."""
    shape = base.entry(weight).shape
    for layout in (change.layout, "conv1d", "linear"):
        found = LowRank(change.A, change.B, layout, scale=change.scale)
        if found.weight_shape == shape:
            return found
    mend = f"the adapter was made for {list(change.weight_shape)}; use its own base"
    raise UserError(f"shape of {weight}", list(shape), mend)


def _tied_once(changes: dict[str, Change]) -> dict[str, Change]:
    """Without the copy peft saves of a tied adapter: an output head whose A and B are those of the embedding, swapped."""
    embeddings = [c for c in changes.values() if isinstance(c, LowRank) and c.layout == "embedding"]

    def copy_of(change: Change, e: LowRank) -> bool:
        return isinstance(change, LowRank) and change is not e and torch.equal(change.A, e.B.T) and torch.equal(change.B, e.A.T)

    return {name: change for name, change in changes.items() if not any(copy_of(change, e) for e in embeddings)}


def _unchanged(change: Replace, base: Source, name: str) -> bool:
    return name in base and base.entry(name).shape == change.weight_shape and torch.equal(base.read(name), change.tensor)


def _copied(name: str, changes: dict[str, Change], base: Source) -> bool:
    """Is it a tied tensor's other name, saved whole as the tensor itself was? peft reads and writes both."""
    change, whole = changes[name], changes.get(base.aliases.get(name, ""))
    return isinstance(change, Replace) and isinstance(whole, Replace) and torch.equal(change.tensor, whole.tensor)


def _refuse_half_tied(changes: dict[str, Change], base: Source) -> None:
    """peft changes only the named side of tied weights, unless told to keep them tied; one shared tensor cannot hold that."""
    for alias, name in sorted(base.aliases.items()):
        sides = [n for n in (alias, name) if n in changes and not isinstance(changes[n], Replace)]
        if sides:
            other = name if sides[0] == alias else alias
            mend = f"the base ties it with {other!r}, which the adapter leaves; untie the base first"
            raise UserError("adapter module", sides[0], mend)
