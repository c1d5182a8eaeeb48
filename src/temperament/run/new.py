"""`temper new`: a complete recipe from a few words, every line with what it means.

    text = write("sft", base="lab/lm", data="new.jsonl", method="adapters.lora")

The comments are the options' own help, so they cannot drift; the rates are a sensible beginning by size of the base and method
(adapters ten times full tuning; preferences and policies a tenth of SFT), not a promise: `temper compare` finds better ones.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from temperament import parts
from temperament.errors import UserError, nearest
from temperament.protocols import Trainable
from temperament.run import recipe as schema

KINDS = {
    "sft": "supervised fine-tuning on prompts with completions, conversations or texts",
    "kl-sft": "the same, held near what the base says by a KL term",
    "dpo": "preferences: chosen against rejected answers",
    "grpo": "reinforcement learning on verified answers",
}
OTHER_NAMES = {
    "rl": "grpo",
    "rlhf": "dpo",
    "rm": "dpo",
    "pt": "sft",
    "pretrain": "sft",
    "finetune": "sft",
    "lora": "sft",
    "rlvr": "grpo",
    "ppo": "grpo",
}
TAKES = {  # shapes of rows a kind is made for
    "sft": ("tokenised", "completion", "chat", "sharegpt", "alpaca", "text"),
    "dpo": ("preference",),
    "grpo": ("completion", "chat", "sharegpt", "alpaca", "prompt"),
}
TAKES["kl-sft"] = TAKES["sft"]
# parameters of the base up to which a full learning rate of SFT is a gentle beginning
RATES = ((50e6, 1e-4), (500e6, 5e-5), (3e9, 2e-5), (float("inf"), 1e-5))


def write(
    kind: str,
    *,
    base: str,
    data: str,
    method: str = "adapters.lora",
    steps: int | None = None,
    epochs: float | None = None,
    lr: float | None = None,
    batch: int | None = None,
    reward: str = "rewards.exact",
    keep_data: str | None = None,
    seed: int = 0,
    columns: dict[str, str] | None = None,
) -> str:
    """The text of a recipe.yaml. Raises UserError for an unknown kind, method or reward, with the nearest name, and for rows
    of another kind. columns: ours by the file's names, where these differ."""
    known(kind)
    if steps is not None and epochs is not None:
        raise UserError("--steps", steps, "give either --steps or --epochs")
    for name, value in (("--steps", steps), ("--epochs", epochs), ("--lr", lr), ("--batch", batch)):
        if value is not None and not value > 0:
            raise UserError(name, value, "give a number above 0")
    factor = getattr(type(parts.build(method, Trainable, "--method")), "rate_factor", 1.0)
    size = size_of(base)
    rows = {"path": data} | source_of(kind, data, columns)
    document = _document(kind, base, rows, method, steps, epochs, lr or rate(kind, size, factor), batch, reward, seed)
    return _heading(kind, size, method) + commented(schema.read(document), document)


def known(kind: str) -> None:
    if kind not in KINDS:
        hint = f"did you mean {OTHER_NAMES[kind]!r}?" if kind in OTHER_NAMES else nearest(kind, KINDS)
        raise UserError("temper new", kind, f"no such kind of recipe; {hint}")


def source_of(kind: str, data: str, columns: dict[str, str] | None) -> dict[str, Any]:
    """How a source should read this file, from a look at its first rows; of what is no file here, only what was said."""
    if not Path(data).expanduser().is_file():
        return {"columns": columns} if columns else {}
    from temperament.engine.rows import glance

    shape, columns = glance(data, columns)
    if shape not in TAKES[kind]:
        fitting = [k for k in KINDS if shape in TAKES[k]]
        mend = f"for these there is {' or '.join(f'`temper new {k}`' for k in fitting)}" if fitting else "give other rows"
        has = f"its rows are of the shape {shape!r}, and {kind} takes {', '.join(TAKES[kind])}"
        raise UserError("--data", data, f"{has}; {mend}")
    return {"shape": shape} | ({"columns": columns} if columns else {})


def rate(kind: str, size: float | None, factor: float = 1.0) -> float:
    """A gentle learning rate for a base of so many parameters (unknown: a billion). factor: the method's usual rate over that
    of full tuning, as it says of itself."""
    full = next(lr for most, lr in RATES if (size or 1e9) <= most)
    return float(f"{full * factor * (0.1 if kind in ('dpo', 'grpo') else 1):.1g}")


def _document(
    kind: str,
    base: str,
    data: dict[str, Any],
    method: str,
    steps: Any,
    epochs: Any,
    lr: float,
    batch: Any,
    reward: str,
    seed: int,
) -> dict[str, Any]:
    rows: dict[str, Any] = {"data.file": data}
    train: dict[str, Any] = {"source": rows}
    if kind == "grpo":
        train["source"] = {"rollout.sample": {"prompts": rows, "rewards": [reward], "group": 8}}
    objective = {"dpo": "objectives.preference.dpo", "grpo": "objectives.policy.grpo"}.get(kind, "objectives.sft.cross_entropy")
    train |= {"trainable": [method], "objective": objective}
    if kind == "kl-sft":
        train["regularizers"] = [{"regularizers.kl": {"weight": 0.1}}]
    train["optimizer"] = {"optim.adamw": {"lr": {"schedules.cosine": {"peak": lr, "warmup": 10}}}}
    if epochs is None:
        epochs = None if steps is not None or kind == "grpo" else 3.0
        steps = steps or (200 if kind == "grpo" else None)
    train |= {"steps": steps} if steps is not None else {"epochs": epochs}
    train |= {"batch": batch or (64 if kind == "grpo" else 16), "micro": 16}
    return {
        "base": base,
        "seed": seed,
        "steps": [{"name": kind, "train": train}],
        "evaluation": {"dial": {"strengths": [0.0, 0.25, 0.5, 0.75, 1.0]}},
    }


def _heading(kind: str, size: float | None, method: str) -> str:
    what = KINDS[kind]
    return (
        f"# {kind}: {what}; trained with {method}"
        + (f" on a base of {count(size)} parameters" if size else "")
        + (
            ".\n#     temper plan FILE      memory, time and disk before anything is done\n"
            "#     temper tune FILE      measure, train, measure again; --set sft.train.batch=32 for one run\n\n".replace(
                "sft.", f"{kind}."
            )
        )
    )


# ---- the base's size, without loading it ------------------------------------------------------------------------------------


def size_of(base: str) -> float | None:
    """Parameters of a base: from the headers of its safetensors, or from a name like Qwen2.5-0.5B; None when neither says."""
    from temperament.bases.load import locate

    folder = locate(base, "--base")
    if folder is not None and (files := sorted(folder.glob("*.safetensors"))):
        return float(sum(_header_parameters(f) for f in files))
    found = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)\s*([bBmM])(?![a-zA-Z])", base.replace("-", " ").replace("_", " "))
    return float(found[-1][0]) * (1e9 if found[-1][1] in "bB" else 1e6) if found else None


def _header_parameters(file: Path) -> int:
    import math

    try:
        with open(file, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(min(length, 100 << 20)))
        return sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, struct.error, AttributeError):
        raise UserError("--base", str(file), "its header cannot be read: the file is damaged or truncated") from None


def count(n: float) -> str:
    for unit, scale in (("billion", 1e9), ("million", 1e6)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n:,.0f}"


# ---- the text ---------------------------------------------------------------------------------------------------------------

HIDDEN = {
    "players",
    "aides",
    "inference",
    "log_with",
    "trust_remote_code",
    "ema",
    "Train.keep",
    "save",
    "when",
    "start",
    "ledger",
}
OFFERED = {
    "Train.regularizers": "[{regularizers.kl: {weight: 0.1}}]",
    "Train.stop": "{skill: target, reach: 0.9}",
}  # written as comments
COLUMN = 58  # where comments begin


def commented(recipe: schema.Recipe, document: dict[str, Any]) -> str:
    """The recipe as YAML: what `document` says and the defaults around it, each line with its help; rarely needed keys that
    were not given are left out (`temper tune` writes all of them into the run folder)."""
    lines: list[str] = []
    _mapping(recipe, document, "", lines)
    return "".join(line + "\n" for line in lines)


def _mapping(value: Any, given: Any, pad: str, lines: list[str]) -> None:
    """The fields of a dataclass, each `key: value  # help`."""
    helps = parts.option_help(type(value))
    for f in fields(value):
        if not f.init or f.name.startswith("_"):
            continue
        mine = given.get(f.name) if isinstance(given, dict) else None
        inner = getattr(value, f.name)
        called = f"{type(value).__name__}.{f.name}"
        if mine is None and called in OFFERED:
            _line(f"{pad}# {f.name}: {OFFERED[called]}", helps.get(f.name, ""), lines)
            continue
        if mine is None and inner is None and not (f.name in HIDDEN or called in HIDDEN):
            _line(f"{pad}# {f.name}: null", helps.get(f.name, ""), lines)
            continue
        if mine is None and (f.name in HIDDEN or called in HIDDEN or inner in ({}, "", [], ())):
            continue
        _entry(f.name, inner, mine, pad, lines, helps.get(f.name, ""))


def _entry(key: str, value: Any, given: Any, pad: str, lines: list[str], note: str) -> None:
    if hasattr(type(value), "part_name"):
        _line(f"{pad}{key}:", note, lines)
        _part(value, given, pad + "  ", lines)
    elif isinstance(value, (list, tuple)) and value and (hasattr(type(value[0]), "part_name") or is_dataclass(value[0])):
        _line(f"{pad}{key}:", note, lines)
        for i, one in enumerate(value):
            inner: list[str] = []
            mine = given[i] if isinstance(given, list) and i < len(given) else given
            (_part if hasattr(type(one), "part_name") else _mapping)(one, mine, pad + "    ", inner)
            inner[0] = f"{pad}  - {inner[0].lstrip()}"
            lines += inner
    elif is_dataclass(value):
        _line(f"{pad}{key}:", note, lines)
        _mapping(value, given, pad + "  ", lines)
    else:
        _line(f"{pad}{key}: {scalar(value)}", note, lines)


def _part(value: Any, given: Any, pad: str, lines: list[str]) -> None:
    name = type(value).part_name
    summary = (type(value).__doc__ or "").strip().split("\n")[0].rstrip(".")
    inner: list[str] = []
    _mapping(value, given.get(name) if isinstance(given, dict) else None, pad + "  ", inner)
    _line(f"{pad}{name}:" if inner else f"{pad}{name}: {{}}", summary, lines)
    lines += inner


def _line(text: str, note: str, lines: list[str]) -> None:
    lines.append(f"{text.ljust(COLUMN)}  # {note}" if note else text)


def scalar(value: Any) -> str:
    """One value on one line of YAML."""
    return (
        yaml.safe_dump(parts.plain(value), default_flow_style=True, width=10_000, allow_unicode=True)
        .strip()
        .removesuffix("\n...")
        .strip()
    )
