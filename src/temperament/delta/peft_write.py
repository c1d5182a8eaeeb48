"""PEFT adapter directories, written: peft loads them and computes the same logits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from temperament.delta.change import Change, LowRank
from temperament.delta.delta import Delta
from temperament.delta.files import atomic_folder, safe_name, write_json
from temperament.delta.lowrank import as_low_rank
from temperament.delta.on_weight import Renormalised, Replace
from temperament.delta.peft_format import FORMAT, PREFIX, SIDE, read_peft
from temperament.delta.stream import Source, open_source
from temperament.delta.tensorfile import write_tensors
from temperament.errors import UserError

NO_TARGET = "dummy-target-modules"  # peft's own name for "no LoRA, only modules_to_save"


TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def task_type(classes: Iterable[str], encoder_decoder: bool = False) -> str | None:
    """PEFT's word for what models of these classes do; None where it has none (a masked LM, an image classifier, a policy)."""
    for name in classes:
        if name.endswith("ForConditionalGeneration"):
            return "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM"
        if (found := next((task for end, task in TASKS.items() if name.endswith(end)), None)) is not None:
            return found
    return None


def not_peft(delta: Delta, base=None) -> str:
    """Why peft's LoRA format cannot hold this delta; empty when it can."""
    try:
        _plan(delta, None if base is None else open_source(base))
    except UserError as error:
        return str(error)
    return ""


def write_peft(
    delta: Delta,
    folder: str | Path,
    *,
    base=None,
    base_model: str = "",
    task_type: str | None = None,
    name: str = "default",
    overwrite: bool = False,
) -> None:
    """adapter_config.json, adapter_model.safetensors and our delta.json, in `folder` (or its sub-folder `name`, as peft does).

    Low-rank changes become LoRA (Renormalised ones DoRA), tuned tensors modules_to_save; with `base` (path, module, Source)
    given, any other change is applied to its weight and saved whole, and target_modules are short suffixes where those say the
    same. The strength is in the scales. What peft cannot hold is a UserError (`not_peft` asks first; `Delta.save` always can).
    """
    folder = Path(folder) if name == "default" else Path(folder) / safe_name(name, "adapter name")
    source = None if base is None else open_source(base, *delta.components[:1])
    loras, whole = _plan(delta, source)
    saved = _saved(whole, loras, source, delta)
    tensors: dict[str, Tensor] = {}
    for path, change in loras.items():
        tensors |= {f"{path}.{key}": t for key, t in _keys(change).items()}
    for path, tensor in whole.items():
        module, _, kind = path.rpartition(".")
        tensors[f"{module}.base_layer.{kind}" if module in loras else path] = tensor
    tied = {alias: whole[name] for alias, name in _tied(source).items() if name in whole}  # peft reads both names
    tensors |= tied
    config = _config(loras, saved, any(p.rpartition(".")[0] not in saved for p in whole), source)
    config |= {"base_model_name_or_path": base_model, "task_type": task_type}
    with atomic_folder(folder, overwrite) as new:
        write_tensors(new, {PREFIX + key: t.contiguous() for key, t in tensors.items()}, "adapter_model")
        write_json(new / "adapter_config.json", config)
        got = read_peft(new, component=delta.components[0])  # the delta as a reader gets it, scales folded
        twice = {f"{delta.components[0]}/{alias}" for alias in tied}
        digest = replace(got, changes={n: c for n, c in got.changes.items() if n not in twice}).digest
        side = {"base": dict(delta.base), "component": delta.components[0], "digest": digest, "meta": dict(delta.meta)}
        write_json(new / SIDE, {"format": FORMAT} | side | ({"tied": sorted(tied)} if tied else {}))


def _plan(delta: Delta, base: Source | None) -> tuple[dict[str, Change], dict[str, Tensor]]:
    """({module path: LowRank or Renormalised}, {parameter path: tuned tensor})."""
    if len(delta.components) != 1:
        raise UserError("components", delta.components, "a PEFT adapter is of one component; restrict the delta to one")
    if delta.buffers:
        raise UserError("buffer", min(delta.buffers), "peft's LoRA format has no buffers; save it as a temperament delta")
    loras: dict[str, Change] = {}
    whole: dict[str, Tensor] = {}
    for name, addition in sorted(delta.additions.items()):
        if addition.part or delta.strength * addition.strength != 1:
            raise UserError("addition", name, "peft's LoRA format cannot rebuild its module; save it as a temperament delta")
        whole[name.split("/", 1)[1]] = addition.tensors["value"]
    for name, change in delta.items():
        path = name.split("/", 1)[1]
        low = as_low_rank(change)
        dora = isinstance(change, Renormalised) and change.scale == 1 and isinstance(change.change, LowRank)
        if path.endswith(".weight") and (low is not None or dora):
            loras[path.removesuffix(".weight")] = low if low is not None else change
        elif isinstance(change, Replace) and change.scale == 1:
            whole[path] = change.tensor
        elif base is not None:
            whole[path] = change.apply(base.read(name))
        else:
            mend = f"a {change.kind} change is not low rank; pass the base to save the tuned tensor, or use a temperament delta"
            raise UserError("parameter", name, mend)
    kinds = {isinstance(change, Renormalised) for change in loras.values()}
    if len(kinds) > 1:
        raise UserError("parameter", min(loras), "peft has DoRA on all modules or none; save it as a temperament delta")
    return loras, whole


def _saved(whole: dict[str, Tensor], loras: dict[str, Change], base: Source | None, delta: Delta) -> list[str]:
    """modules_to_save: the modules of tuned tensors other than biases (those peft keeps as bias="all").

    peft wants every tensor of such a module, and wraps every module whose path ends in the same letters: with the base at hand,
    what is missing is added to `whole` (a LoRA of such a module is applied).
    """
    saved = sorted({path.rpartition(".")[0] for path in whole if not path.endswith(".bias")})
    if base is None:
        return saved
    for full in base.names:
        path = full.split("/", 1)[1]
        module = path.rpartition(".")[0]
        if module.endswith(tuple(saved)) and saved and path not in whole:
            loras.pop(module, None)
            whole[path] = delta.change(full).apply(base.read(full)) if full in delta.changes else base.read(full)
    return saved


def _tied(base: Source | None) -> dict[str, str]:
    """{other name of a tied tensor: its name}, without components."""
    bare = lambda name: name.split("/", 1)[1]
    return {} if base is None else {bare(alias): bare(name) for alias, name in base.aliases.items()}


def _keys(change: Change) -> dict[str, Tensor]:
    low = change.change if isinstance(change, Renormalised) else change
    if low.layout == "embedding":
        found = {"lora_embedding_A": low.A, "lora_embedding_B": low.B}
    else:
        found = {"lora_A.weight": low.A, "lora_B.weight": low.B.reshape(*low.B.shape, *[1] * (low.A.dim() - 2))}
    if isinstance(change, Renormalised):
        shape = (-1,) if low.A.dim() == 2 else (1, -1, *[1] * (low.A.dim() - 2))
        found["lora_magnitude_vector"] = change.magnitude.reshape(shape)
    return found


def _config(loras: dict[str, Change], saved: list[str], biases: bool, base: Source | None) -> dict:
    low = {path: c.change if isinstance(c, Renormalised) else c for path, c in loras.items()}
    ranks = {path: c.rank for path, c in low.items()}
    alphas = {path: _alpha(c) for path, c in low.items()}
    rank, alpha = (Counter(found.values()).most_common(1)[0][0] if found else 8 for found in (ranks, alphas))

    def patterns(found: dict, usual) -> dict:
        return {"^" + re.escape(path): value for path, value in sorted(found.items()) if value != usual}

    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": patterns(ranks, rank),
        "alpha_pattern": patterns(alphas, alpha),
        "target_modules": _targets(sorted(loras), base) or NO_TARGET,
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(c.layout == "conv1d" for c in low.values()),
        "use_dora": any(isinstance(c, Renormalised) for c in loras.values()),
        "use_rslora": False,
        "bias": "all" if biases else "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "revision": None,
        # a change of a tied tensor is a change of both its names; peft then ties the adapters too
        **({"ensure_weight_tying": True} if any(c.layout == "embedding" for c in low.values()) or _embeds(saved) else {}),
    }


def _alpha(change: LowRank) -> float | int:
    alpha = change.scale * change.rank
    return int(alpha) if alpha == int(alpha) else alpha


def _embeds(saved: Iterable[str]) -> bool:
    return any(path.rsplit(".", 1)[-1] in ("embed_tokens", "wte", "word_embeddings", "shared", "lm_head") for path in saved)


def _targets(paths: list[str], base: Source | None) -> list[str]:
    """Suffixes (q_proj, ...) where in this base they name exactly these modules; else the full paths, which always do."""
    if base is None:
        return paths
    suffixes = {path.rsplit(".", 1)[-1] for path in paths}
    matrices = [n.split("/", 1)[1] for n in base.names if n.endswith(".weight") and len(base.entry(n).shape) > 1]
    named = [n.removesuffix(".weight") for n in matrices if n.removesuffix(".weight").rsplit(".", 1)[-1] in suffixes]
    return sorted(suffixes) if sorted(named) == paths else paths
