"""A mergekit YAML as it is, read as a merge plan: models or slices, settings by model, slice and depth, filters, dtype,
tokenizer.

    merge_method: ties
    base_model: org/base
    models:
      - {model: org/a, parameters: {weight: 0.5, density: [0.3, 0.7]}}
      - {model: org/b+some/adapter, parameters: {weight: [{filter: mlp, value: 0.9}, {value: 0.3}]}}
    parameters: {normalize: true}
    dtype: bfloat16

Arithmetic is done in fp32 and rounded once, to out_dtype or dtype. A setting is looked for in the model's parameters, the
slice's, then the whole's; a list of numbers is a gradient over the layers of a slice, tensors outside layers take its start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml

from temperament import parts
from temperament.delta.depth import block_of
from temperament.delta.stream import Source
from temperament.delta.views import View
from temperament.errors import UserError
from temperament.protocols import Merge
from temperament.run import chat_templates
from temperament.run.merge_inputs import Input, open_input
from temperament.run.merge_plan import Job, Plan, aligned, layers_of, natural
from temperament.run.mergekit_check import DTYPES, checked, flag, number
from temperament.run.mergekit_methods import METHODS, Meaning
from temperament.run.vocabulary import Vocabulary, tokenizer_of


def is_mergekit(document: Any) -> bool:
    """Is this meant as a mergekit configuration: a mapping, or the path of a YAML file that holds one (or several)?"""
    if isinstance(document, str | Path):
        try:
            read = list(yaml.safe_load_all(Path(document).read_text(encoding="utf-8")))
        except (OSError, ValueError, yaml.YAMLError):
            return False
        return any(is_mergekit(d) for d in read if isinstance(d, Mapping))
    if not isinstance(document, Mapping) or "steps" in document:
        return False
    method = get_close_matches("merge_method", [str(k) for k in document], n=1, cutoff=0.75)
    return bool(method) or any(key in document for key in ("models", "slices", "modules"))


def read_all(path: str | Path) -> list[dict[str, Any]]:
    """The configurations of a file: one, or several parted by lines of ---."""
    try:
        found = [d for d in yaml.safe_load_all(Path(path).read_text(encoding="utf-8")) if d is not None]
    except FileNotFoundError:
        raise UserError("merge file", str(path), "there is no such file") from None
    except (OSError, ValueError, yaml.YAMLError) as problem:
        raise UserError("merge file", str(path), f"it is not YAML ({str(problem).splitlines()[0]})") from None
    for document in found:
        if not isinstance(document, Mapping):
            raise UserError("merge file", str(path), "it needs merge_method and models or slices")
    return found


def read_yaml(path: str | Path) -> dict[str, Any]:
    found = read_all(path)
    if len(found) != 1 or not is_mergekit(found[0]):
        many = f"it holds {len(found)} merges; " if len(found) > 1 else ""
        raise UserError("merge file", str(path), f"{many}it needs one, with merge_method and models or slices")
    return found[0]


def notes(document: Mapping[str, Any]) -> list[str]:
    """What of the file is not read, a sentence each."""
    return checked(document)[1]


def named_models(document: Mapping[str, Any]) -> list[str]:
    """The models of a file as they are written."""
    document, _ = checked(document)
    listed = document.get("models") or [source for item in document["slices"] for source in item["sources"]]
    return [entry["model"] for entry in listed]


def beside(document: Mapping[str, Any], as_: str) -> None:
    """UserError where what is asked beside a file cannot be made of it. as_: merged, adapter or delta."""
    document, _ = checked(document)
    if as_ == "merged":
        return
    method = document["merge_method"]
    if METHODS[method].base in ("among", "first") or not document.get("base_model") or "slices" in document:
        mend = f"{method} of this file is no change of a base; use merged, or a method on differences with its base_model"
        raise UserError("--as", as_, mend)
    for key in ("tokenizer", "tokenizer_source", "chat_template"):
        if document.get(key):
            raise UserError("--as", as_, f"the file sets {key}, which a change of a base does not hold; use merged")


def plan(given: Mapping[str, Any]) -> Plan:
    """UserError names what is missing, unknown or not supported."""
    document, _ = checked(given)
    meaning, opened = METHODS[document["merge_method"]], {}

    def get(spec: str, field: str) -> Input:
        if spec not in opened:
            opened[spec] = open_input(spec, field=field)
        return opened[spec]

    base = get(document["base_model"], "base_model") if document.get("base_model") else None
    slices = _slices(document, base, get)
    reader = _Reader(document, given, meaning, base, slices)
    return reader.plan(list(opened.values()))


@dataclass(frozen=True)
class Piece:
    """A source of an output slice: a model, its layers [first, last), its parameters."""

    model: Input
    first: int
    last: int
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Slice:
    pieces: tuple[Piece, ...]
    parameters: Mapping[str, Any]
    base: Input | None


def _slices(document: Mapping, base: Input | None, get: Any) -> list[Slice]:
    if "models" in document:
        listed = enumerate(document["models"])
        pieces = [Piece(get(m["model"], f"models[{i}].model"), 0, -1, m["parameters"]) for i, m in listed]
        return [Slice(tuple(pieces), {}, base)]
    out = []
    for i, item in enumerate(document["slices"]):
        pieces = []
        for k, source in enumerate(item["sources"]):
            field, span = f"slices[{i}].sources[{k}]", source["layer_range"]
            model = get(source["model"], f"{field}.model")
            count = layers_of(model.source.names)[1]
            if span[1] > count:
                raise UserError(f"{field}.layer_range", span, f"give [first, last) within the {count} layers of {model.spec}")
            pieces.append(Piece(model, *span, source["parameters"]))
        if len({p.last - p.first for p in pieces}) != 1:
            raise UserError(
                f"slices[{i}].sources", [[p.first, p.last] for p in pieces], "each must have the same number of layers"
            )
        own = get(item["base_model"], f"slices[{i}].base_model") if item.get("base_model") else base
        out.append(Slice(tuple(pieces), item["parameters"], own))
    return out


class _Reader:
    def __init__(self, document: Mapping, given: Mapping, meaning: Meaning, base: Input | None, slices: list[Slice]):
        self.document, self.given, self.meaning, self.base, self.slices = document, given, meaning, base, slices
        self.whole = document.get("parameters") or {}

    def dtype(self) -> torch.dtype | None:
        name = self.document.get("out_dtype") or self.document.get("dtype")
        return None if name is None else DTYPES[str(name).removeprefix("torch.")]

    def method(self, part: Slice, models: list[Piece], base: Input | None) -> Any:
        m, levels = self.meaning, [part.parameters, self.whole]
        options = dict(m.fixed)
        for key, (option, default) in m.each.items():
            options[option] = [_rules([p.parameters, *levels], key, default) for p in models]
        for key, (option, default) in m.one.items():
            options[option] = _rules([*(p.parameters for p in part.pieces if key in m.own), *levels], key, default)
            if options[option] is None:
                raise UserError(f"parameters.{key}", None, f"{self.document['merge_method']} needs it; give a number")
        for key, (option, default) in m.flags.items():
            options[option] = _flag(levels, key, default)
        for key, option in m.numbers.items():
            if (value := _first(levels, key)) is not None:
                found = number(f"parameters.{key}", value)
                options[option] = int(found) if found.is_integer() else found
        if m.part == "merge.model_stock":
            options["by"] = "row" if _flag(levels, "filter_wise", False) else "tensor"
        if "rescale" in m.hand and _flag(levels, "rescale", False):
            raise UserError(
                "parameters.rescale", True, f"{self.document['merge_method']} keeps entries as they are here; remove it"
            )
        if "nuslerp_flatten" in m.hand and not _flag(levels, "nuslerp_flatten", True):
            raise UserError("parameters.nuslerp_flatten", False, "tensors are turned whole here, not by row; remove it")
        if m.base == "maybe":
            options["about"] = "zero" if base is None else "base"
        return parts.build({m.part: options}, Merge, "merge_method")

    def order(self, part: Slice) -> tuple[Input | None, list[Piece]]:
        """The base, and the models in the order the method takes them."""
        base, pieces = part.base, list(part.pieces)
        if self.meaning.base == "among":
            return None, pieces
        if base is None and self.meaning.base != "maybe":
            raise UserError("base_model", None, f"{self.document['merge_method']} needs it")
        own = [p for p in pieces if base is not None and p.model is base]
        rest = [p for p in pieces if p not in own]
        if self.meaning.base == "first":
            own = own or [Piece(base, pieces[0].first, pieces[0].last, {})]
            if len(rest) != 1:
                raise UserError("models", len(rest), "slerp joins the base_model with one other")
            return None, [own[0], *rest]
        if self.meaning.part == "merge.slerp" and (own or len(rest) != 2):
            mend = "nuslerp joins two models, of which none is the base_model; multislerp and karcher join more"
            raise UserError("models", [p.model.spec for p in pieces], mend)
        return base, rest

    def plan(self, inputs: list[Input]) -> Plan:
        first = self.base or self.slices[0].pieces[0].model
        vocabulary = Vocabulary.of(self.document, self.base, inputs)
        sliced = bool(self.document.get("slices"))
        jobs, layer = [], 0
        for i, part in enumerate(self.slices):
            base, pieces = self.order(part)
            method = self.method(part, pieces, base)
            sources = [vocabulary.view(p.model) for p in pieces]
            under = None if base is None else vocabulary.view(base)
            like = under or sources[0]
            sources = (
                [aligned(s, like, p.model.config) for s, p in zip(sources, pieces, strict=True)] if not sliced else sources
            )
            if not sliced:
                names = tuple(like.names)
                jobs.append(Job(method, tuple(sources), under, names, _depth(names)))
                break
            spans = [(p.first, p.last) for p in pieces]
            base_span = next(((p.first, p.last) for p in part.pieces if p.model is base), spans[0])
            count = spans[0][1] - spans[0][0]
            ends = (i == 0, i == len(self.slices) - 1)
            views = [_sliced(s, *span, layer, ends) for s, span in zip(sources, spans, strict=True)]
            below = None if under is None else _sliced(under, *base_span, layer, ends)
            names = tuple((below or views[0]).names)
            for other in views:
                if set(other.names) != set(names):
                    odd = sorted(set(other.names) ^ set(names))[0].split("/", 1)[1]
                    raise UserError("tensor", odd, f"not all models of slices[{i}] have it; all must be of one architecture")
            jobs.append(Job(method, tuple(views), below, names, _depth(names, layer, count)))
            layer += count
        config = dict(first.config)
        if sliced:
            config = _with_layers(config, layer)
        config = vocabulary.resized(config)
        made = Plan(
            tuple(jobs),
            tuple(inputs),
            config,
            first.folder,
            described=dict(self.given),
            tokenizer=self.tokenizer(vocabulary, first, inputs),
            dtype=self.dtype() or natural(inputs),
            base=self.base.spec if self.base else None,
        )
        return made.check()

    def tokenizer(self, vocabulary: Vocabulary, first: Input, inputs: list[Input]) -> Any:
        """What is made with its chat template; None: the files of the first model as they are."""
        made, asked = vocabulary.tokenizer(), self.document.get("chat_template")
        if asked is None or (template := chat_templates.chosen(asked, inputs)) is None:
            return made
        made = made or tokenizer_of(first, "chat_template")
        made.chat_template = template
        return made


def _depth(names: tuple[str, ...], first: int = 0, count: int | None = None) -> Any:
    """Where a layer is in its slice: 0 the first, 1 the last; a lone layer 1; tensors outside layers 0."""
    if count is None:
        last: dict[str, int] = {}
        for name in names:
            if (at := block_of(name)) is not None:
                last[at[0]] = max(last.get(at[0], 0), at[1])
    else:
        last = {at[0]: first + count - 1 for name in names if (at := block_of(name)) is not None}

    def depth(name: str) -> float:
        at = block_of(name)
        if at is None:
            return 0.0
        width = last[at[0]] - first
        return (at[1] - first) / width if width else 1.0

    return depth


def _sliced(source: Source, first: int, last: int, to: int, ends: tuple[bool, bool]) -> View:
    """Layers [first, last) of a source, numbered from `to`; what lies before and after all layers where the slice is at that
    end."""
    from temperament.delta.depth import depths

    prefix, _ = layers_of(source.names)
    depth, names = depths(source.names), {}
    for name in source.names:
        at = block_of(name)
        if at is None:
            if ends[0 if depth(name) == 0 else 1]:
                names[name] = name
        elif at[0] == prefix and first <= at[1] < last:
            rest = name[len(prefix) + 1 + len(str(at[1])) :]
            names[f"{prefix}{name[len(prefix)]}{at[1] - first + to}{rest}"] = name
    return View(source, names)


def _with_layers(config: dict[str, Any], count: int) -> dict[str, Any]:
    known = [k for k in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if k in config]
    if not known:
        raise UserError("slices", count, "the config does not say how many layers the model has, so no other number can be set")
    old = config[known[0]]
    for key, value in config.items():  # settings a layer: layer_types and the like
        if isinstance(value, list) and len(value) == old and old != count:
            config = {**config, key: (value * (count // old + 1))[:count]}
    return config | {known[0]: count}


def _terminal(value: Any) -> bool:
    return not (isinstance(value, Mapping) or (isinstance(value, list) and value and isinstance(value[0], Mapping)))


def _rules(levels: list[Mapping], key: str, default: float | None) -> Any:
    """One setting out of several levels: the first level that has a value for a name wins."""
    rules: list[Any] = []
    for level in levels:
        if key not in level or level[key] is None:
            continue
        value = level[key]
        if _terminal(value):
            if not rules:
                return value
            return [*rules, {"value": value}]
        rules += value if isinstance(value, list) else [value]
    return [*rules, *([] if default is None else [{"value": default}])] if rules else default


def _first(levels: list[Mapping], key: str) -> Any:
    return next((level[key] for level in levels if level.get(key) is not None), None)


def _flag(levels: list[Mapping], key: str, default: bool) -> bool:
    value = flag(f"parameters.{key}", _first(levels, key))
    return default if value is None else value
