"""A mergekit YAML looked at before any model is opened: keys and types at every level, each fault one sentence.

What mergekit does not read is not read here either: settings of other methods, options of its command line. They are named in
notes. A key that nobody knows is a slip, and refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from temperament.errors import UserError, nearest
from temperament.run.mergekit_methods import FLAGS, METHODS, QUIET, SETTINGS, Meaning

KEYS = ("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype", "tokenizer_source",
        "tokenizer", "chat_template", "name")  # fmt: skip
ELSEWHERE = {"random_seed", "allow_crimes", "copy_tokenizer", "cuda", "lazy_unpickle", "low_cpu_memory", "out_shard_size",
             "trust_remote_code", "clone_tensors", "lora_merge_dtype", "write_model_card", "quiet"}  # fmt: skip
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
NUMBER = "give a finite number, a list of numbers by layer, or rules [{filter: part of a name, value: number}]"


def checked(document: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The file in one form (models or slices at the top, every entry a mapping), and what of it is not read."""
    notes: list[str] = []
    document = dict(document)
    for key in [k for k in document if k not in KEYS and k in SETTINGS | ELSEWHERE]:
        notes.append(f"{key} is not read at the top of a merge file, by mergekit neither; settings stand under parameters.")
        del document[key]
    keys("", document, KEYS)
    name = document.get("merge_method")
    if not isinstance(name, str) or name not in METHODS:
        raise UserError("merge_method", name, f"{_close(name)}methods read here: {', '.join(METHODS)}")
    document = _one_module(document)
    _parameters("parameters", document, notes, METHODS[name], document, whole=True)
    if document.get("base_model") is not None:
        document["base_model"] = spec_of(document["base_model"], "base_model")
    if document.get("models") is not None:
        document["models"] = [
            _model(f"models[{i}]", item, notes, METHODS[name], [document]) for i, item in enumerate(_list("models", document))
        ]
    else:
        document["slices"] = [
            _slice(f"slices[{i}]", item, notes, METHODS[name], document) for i, item in enumerate(_list("slices", document))
        ]
    for key in ("dtype", "out_dtype"):
        if (given := document.get(key)) is not None and str(given).removeprefix("torch.") not in DTYPES:
            raise UserError(key, given, nearest(str(given), DTYPES))
    for key in ("name", "chat_template"):
        if not isinstance(document.get(key), str | None) or document.get(key) == "":
            raise UserError(key, document[key], "give a text")
    _tokenizer(document)
    return document, notes


def keys(field: str, given: Any, known: Iterable[str]) -> None:
    """A mapping of these keys."""
    known = tuple(known)
    if not isinstance(given, Mapping):
        raise UserError(field, given, f"write a mapping with the keys {', '.join(known)}")
    for key, value in given.items():
        if key not in known:
            mend = "write it under parameters" if key in SETTINGS and "parameters" in known else nearest(str(key), known)
            raise UserError(f"{field}.{key}".lstrip("."), value, f"no such key in a merge file; {mend}")


def _close(name: Any) -> str:
    mend = nearest(str(name), METHODS)
    return f"{mend} " if mend.startswith("did you mean") else ""


def _list(field: str, given: Mapping) -> list:
    value = given.get(field.rpartition(".")[2])
    if not isinstance(value, list) or not value:
        raise UserError(field, value, "write a list with a line `- model: ...` each")
    return value


def _one_module(document: dict[str, Any]) -> dict[str, Any]:
    modules = document.pop("modules", None)
    if modules is not None:
        if not isinstance(modules, Mapping) or len(modules) != 1:
            raise UserError("modules", modules, "models of several modules are merged one module at a time; name one")
        ((name, inner),) = modules.items()
        keys(f"modules.{name}", inner, ("models", "slices", "parameters"))
        if inner.get("parameters") is not None and not isinstance(inner["parameters"], Mapping):
            raise UserError(f"modules.{name}.parameters", inner["parameters"], "write a mapping, e.g. {weight: 0.5}")
        for key in ("models", "slices"):
            if document.get(key) and inner.get(key):
                raise UserError(key, document[key], f"modules.{name} has them too; write them once")
        settings = inner.get("parameters")
        document |= {k: v for k, v in inner.items() if k != "parameters"}
        if settings and isinstance(document.get("parameters") or {}, Mapping):
            document["parameters"] = {**(document.get("parameters") or {}), **settings}
    if bool(document.get("models")) == bool(document.get("slices")):
        raise UserError("models", document.get("models"), "give models, or slices, not both")
    for key in ("models", "slices"):
        if not document.get(key):
            document.pop(key, None)
    return document


def spec_of(spec: Any, field: str) -> str:
    """A model as it is written: its name, or {model: {path}, lora: {path}}."""
    if isinstance(spec, str) and spec:
        return spec
    if not isinstance(spec, Mapping):
        raise UserError(field, spec, "name a folder or an id")
    long = "model" in spec
    keys(field, spec, ("model", "lora", "override_architecture") if long else ("path", "revision"))
    if spec.get("override_architecture") is not None:
        raise UserError(f"{field}.override_architecture", spec["override_architecture"], "this is not done here; remove it")
    paths = []
    for part in ("model", "lora") if long else ("",):
        at, given = f"{field}.{part}".rstrip("."), spec.get(part) if long else spec
        if isinstance(given, Mapping):
            keys(at, given, ("path", "revision"))
            if given.get("revision") is not None:
                raise UserError(f"{at}.revision", given["revision"], "fetch that revision to a folder and name the folder")
            given = given.get("path")
        if given is None and part == "lora":
            continue
        if not isinstance(given, str) or not given:
            raise UserError(at, given, "name a folder or an id")
        paths.append(given)
    return "+".join(paths)


def _model(field: str, item: Any, notes: list[str], meaning: Meaning, above: list[Mapping], more: tuple = ()) -> dict[str, Any]:
    item = {"model": item} if isinstance(item, str) and not more else item
    keys(field, item, ("model", "parameters", *more))
    _parameters(f"{field}.parameters", item, notes, meaning, *above)
    return {**item, "model": spec_of(item.get("model"), f"{field}.model"), "parameters": item.get("parameters") or {}}


def _slice(field: str, item: Any, notes: list[str], meaning: Meaning, document: Mapping) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise UserError(field, item, "write {sources: [{model: ..., layer_range: [first, last]}, ...]}")
    keys(field, item, ("sources", "base_model", "parameters", "residual_weight"))
    if item.get("residual_weight") is not None:
        notes.append(f"{field}.residual_weight is not read, by mergekit neither.")
    _parameters(f"{field}.parameters", item, notes, meaning, document, whole=True)
    sources = []
    for k, given in enumerate(_list(f"{field}.sources", item)):
        at = f"{field}.sources[{k}]"
        source = _model(at, given, notes, meaning, [item, document], ("layer_range",))
        span = source.get("layer_range")
        whole = [_whole(v) for v in span] if isinstance(span, list) and len(span) == 2 else [None]
        if None in whole or not 0 <= whole[0] < whole[1]:
            raise UserError(f"{at}.layer_range", span, "give two whole numbers, [first, last), e.g. [0, 16]")
        sources.append(source | {"layer_range": whole})
    out = {**item, "sources": sources, "parameters": item.get("parameters") or {}}
    if item.get("base_model") is not None:
        out["base_model"] = spec_of(item["base_model"], f"{field}.base_model")
    return out


def _whole(value: Any) -> int | None:
    """3, 3.0 and '3' are three."""
    if isinstance(value, bool):
        return None
    try:
        return int(value) if float(value).is_integer() else None
    except (TypeError, ValueError, OverflowError):
        return None


# ---- settings --------------------------------------------------------------------------------------------------------------


def _parameters(field: str, holder: Mapping, notes: list[str], meaning: Meaning, *above: Mapping, whole: bool = False) -> None:
    """Settings of one level. whole: of the merge or a slice, not of a model. above: what holds the levels over it."""
    given = holder.get("parameters")
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise UserError(field, given, "write a mapping, e.g. {weight: 0.5}")
    for key, value in given.items():
        if key not in SETTINGS:
            raise UserError(f"{field}.{key}", value, f"no such setting; {nearest(str(key), meaning.known | QUIET)}")
        flag(f"{field}.{key}", value) if key in FLAGS else setting(f"{field}.{key}", value)
        if key in QUIET:
            continue
        if key not in meaning.known:
            notes.append(f"{field}.{key} is not read: this method has no such setting, in mergekit neither.")
        elif key in meaning.whole and not whole:
            higher = any(key in (level.get("parameters") or {}) for level in above)
            if meaning.one.get(key, (0, 0))[1] is None and not higher:
                mend = "it is one number for the whole merge; write it under the parameters at the top"
                raise UserError(f"{field}.{key}", value, mend)
            notes.append(f"{field}.{key} is not read, by mergekit neither: it is one for the whole merge, under parameters.")


def number(field: str, value: Any) -> float:
    """A finite number; YAML reads 1e-9 as a word."""
    try:
        found = float(value) if isinstance(value, bool | int | float | str) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(field, value, NUMBER)
    return found


def flag(field: str, value: Any) -> bool | None:
    """True and false, also as 1 and 0."""
    if value is None:
        return None
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise UserError(field, value, "give true or false")
    return bool(value)


def setting(field: str, value: Any) -> None:
    """A number, numbers by layer, or rules by name."""
    rules = [value] if isinstance(value, Mapping) else value
    if not isinstance(rules, list) or not any(isinstance(r, Mapping) for r in rules):
        return None if value is None else _numbers(field, value)
    for i, rule in enumerate(rules):
        at = f"{field}[{i}]" if isinstance(value, list) else field
        keys(at, rule, ("filter", "value"))
        if not isinstance(rule.get("filter"), str | None):
            raise UserError(f"{at}.filter", rule["filter"], "give a part of the names it is for, or leave it out")
        if rule.get("value") is None:
            raise UserError(f"{at}.value", None, "give the number of this rule")
        _numbers(f"{at}.value", rule["value"])
    return None


def _numbers(field: str, value: Any) -> None:
    for one in value if isinstance(value, list) and value else [value]:
        number(field, one)


# ---- the tokenizer ---------------------------------------------------------------------------------------------------------


def _tokenizer(document: dict[str, Any]) -> None:
    source, given = document.get("tokenizer_source"), document.get("tokenizer")
    if source is not None:
        document["tokenizer_source"] = spec_of(source, "tokenizer_source")
        if given is not None:
            raise UserError("tokenizer", given, "give tokenizer or tokenizer_source, not both")
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise UserError("tokenizer", given, "write {source: union}, or tokenizer_source: union")
    keys("tokenizer", given, ("source", "tokens", "pad_to_multiple_of"))
    if given.get("source") is not None:
        document["tokenizer"] = given = {**given, "source": spec_of(given["source"], "tokenizer.source")}
    multiple = given.get("pad_to_multiple_of")
    if multiple is not None and (not isinstance(multiple, int) or isinstance(multiple, bool) or not 0 < multiple < 1 << 20):
        raise UserError("tokenizer.pad_to_multiple_of", multiple, "give a whole number, e.g. 64")
    tokens = given.get("tokens")
    if not isinstance(tokens, Mapping | None):
        raise UserError("tokenizer.tokens", tokens, "write {token: {source: ...}, ...}")
    for token, what in (tokens or {}).items():
        at = f"tokenizer.tokens.{token}"
        if not isinstance(token, str):
            raise UserError(at, token, "write the token in quotes")
        keys(at, what, ("source", "force"))
        if not isinstance(what.get("force"), bool | None):
            raise UserError(f"{at}.force", what["force"], "give true or false")
        _row(f"{at}.source", what.get("source"))


def _row(field: str, source: Any) -> None:
    if source is None:
        return
    if not isinstance(source, Mapping) or "kind" not in source:
        spec_of(source, field)
        return
    kind = source["kind"]
    if kind not in ("zero", "model_token"):
        raise UserError(f"{field}.kind", kind, "give zero or model_token")
    keys(field, source, ("kind",) if kind == "zero" else ("kind", "model", "token", "token_id"))
    if kind == "model_token":
        spec_of(source.get("model"), f"{field}.model")
        token, at = source.get("token"), source.get("token_id")
        right = isinstance(token, str) if at is None else isinstance(at, int) and not isinstance(at, bool) and at >= 0
        if not right or (token is not None and at is not None):
            raise UserError(field, source, "name a token, or the token_id of one")
