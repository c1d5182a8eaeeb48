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
from pathlib import Path
from typing import Any

import torch
import yaml

from temperament import parts
from temperament.delta.depth import block_of
from temperament.delta.stream import Source
from temperament.delta.views import View
from temperament.errors import UserError, nearest
from temperament.protocols import Merge
from temperament.run.merge_inputs import Input, open_input
from temperament.run.merge_plan import Job, Plan, aligned, layers_of, natural
from temperament.run.vocabulary import Vocabulary

KEYS = ("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype", "tokenizer_source",
        "tokenizer", "chat_template", "name")  # fmt: skip
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Meaning:
    """How a method of theirs is one of ours. each: setting a model -> option; one: setting -> option; flags: bool -> option."""

    part: str
    each: Mapping[str, tuple[str, float]]
    one: Mapping[str, tuple[str, float]]
    flags: Mapping[str, tuple[str, bool]]
    fixed: Mapping[str, Any]
    base: str = "apart"  # or "first": base is the first of the models; "among": one of them where listed; "no"
    numbers: Mapping[str, str] = None  # whole settings -> option


def arithmetic(
    part: str, each: dict[str, tuple[str, float]], normalise: bool, rescale: bool | None = None, **fixed: Any
) -> Meaning:
    flags = {"normalize": ("normalise", normalise)} | ({} if rescale is None else {"rescale": ("rescale", rescale)})
    return Meaning(part, {"weight": ("weights", 1.0), **each}, {"lambda": ("scale", 1.0)}, flags, fixed)


DENSITY = {"density": ("density", 1.0)}
METHODS = {
    "linear": Meaning(
        "merge.linear", {"weight": ("weights", 1.0)}, {}, {"normalize": ("normalise", True)}, {"of": "weights"}, "among"
    ),
    "slerp": Meaning("merge.slerp", {}, {"t": ("t", 0.5)}, {}, {}, "first"),
    "task_arithmetic": arithmetic("merge.task_arithmetic", {}, False),
    "ties": arithmetic("merge.ties", DENSITY, True),
    "dare_ties": arithmetic("merge.dare", DENSITY, False, True, elect=True),
    "dare_linear": arithmetic("merge.dare", DENSITY, False, True),
    "della": arithmetic("merge.della", DENSITY | {"epsilon": ("epsilon", 0.15)}, True, True, elect=True),
    "della_linear": arithmetic("merge.della", DENSITY | {"epsilon": ("epsilon", 0.15)}, False, True, elect=False),
    "breadcrumbs": arithmetic("merge.breadcrumbs", DENSITY | {"gamma": ("gamma", 0.01)}, False),
    "breadcrumbs_ties": arithmetic("merge.breadcrumbs", DENSITY | {"gamma": ("gamma", 0.01)}, False, elect=True),
    "multislerp": Meaning("merge.multislerp", {"weight": ("weights", 1.0)}, {}, {"normalize_weights": ("normalise", True)}, {}),
    "karcher": Meaning("merge.karcher", {}, {}, {}, {}, "among", {"max_iter": "steps", "tol": "tolerance"}),
    "model_stock": Meaning("merge.model_stock", {}, {}, {}, {}),
    "sce": Meaning("merge.sce", {}, {"select_topk": ("density", 1.0)}, {}, {}),
    "passthrough": Meaning("merge.passthrough", {}, {"scale": ("scale", 1.0)}, {}, {}, "among"),
}
SILENT = {"int8_mask", "rescale", "filter_wise", "eps"}  # accepted where they change nothing, or are read by hand


def is_mergekit(document: Any) -> bool:
    """Is this a mergekit configuration: a mapping, or the path of a YAML file that holds one?"""
    if isinstance(document, str | Path):
        try:
            document = yaml.safe_load(Path(document).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            return False
    return isinstance(document, Mapping) and "merge_method" in document


def read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("merge file", str(path), "there is no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise UserError("merge file", str(path), f"it is not YAML ({str(problem).splitlines()[0]})") from None
    if not is_mergekit(document):
        raise UserError("merge file", str(path), "it needs merge_method and models or slices")
    return document


def plan(document: Mapping[str, Any]) -> Plan:
    """UserError names what is missing, unknown or not supported."""
    for key in document:
        if key not in KEYS:
            raise UserError(str(key), document[key], f"no such key in a merge file; {nearest(str(key), KEYS)}")
    document = _one_module(dict(document))
    name = document["merge_method"]
    if name not in METHODS:
        raise UserError("merge_method", name, nearest(str(name), METHODS))
    meaning, opened = METHODS[name], {}

    def get(spec: Any, field: str = "model") -> Input:
        spec = _spec(spec, field)
        if spec not in opened:
            opened[spec] = open_input(spec, field=field)
        return opened[spec]

    base = get(document["base_model"], "base_model") if document.get("base_model") else None
    slices = _slices(document, base, get)
    reader = _Reader(document, meaning, base, slices)
    return reader.plan(list(opened.values()))


def _spec(spec: Any, field: str) -> str:
    if isinstance(spec, Mapping):  # the long form: {model: {path, revision}, lora: {path}}
        path = lambda part: part.get("path") if isinstance(part, Mapping) else part
        model, lora = path(spec.get("model")), path(spec.get("lora"))
        if model:
            return f"{model}+{lora}" if lora else str(model)
    if not isinstance(spec, str):
        raise UserError(field, spec, "name a folder or an id")
    return spec


def _one_module(document: dict[str, Any]) -> dict[str, Any]:
    modules = document.pop("modules", None)
    if modules is not None:
        if not isinstance(modules, Mapping) or len(modules) != 1:
            raise UserError("modules", sorted(modules), "models of several modules are merged one module at a time")
        inner = dict(next(iter(modules.values())))
        settings = inner.pop("parameters", None)
        document |= inner
        if settings:
            document["parameters"] = {**(document.get("parameters") or {}), **settings}
    if bool(document.get("models")) == bool(document.get("slices")):
        raise UserError("models", document.get("models"), "give models, or slices, not both")
    return document


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
    if document.get("models"):
        pieces = []
        for i, item in enumerate(document["models"]):
            item = {"model": item} if isinstance(item, str) else item
            if not isinstance(item, Mapping) or "model" not in item:
                raise UserError(f"models[{i}]", item, "write {model: ..., parameters: {...}}")
            pieces.append(Piece(get(item["model"], f"models[{i}].model"), 0, -1, item.get("parameters") or {}))
        return [Slice(tuple(pieces), {}, base)]
    out = []
    for i, item in enumerate(document["slices"]):
        pieces, sources = [], item.get("sources") if isinstance(item, Mapping) else None
        if not isinstance(sources, list) or not all(isinstance(s, Mapping) for s in sources):
            raise UserError(f"slices[{i}]", item, "write {sources: [{model: ..., layer_range: [first, last]}, ...]}")
        for k, source in enumerate(sources):
            field = f"slices[{i}].sources[{k}]"
            model = get(source.get("model"), f"{field}.model")
            count = layers_of(model.source.names)[1]
            span = source.get("layer_range")
            if not (isinstance(span, list) and len(span) == 2 and 0 <= span[0] < span[1] <= count):
                raise UserError(f"{field}.layer_range", span, f"give [first, last) within the {count} layers of {model.spec}")
            pieces.append(Piece(model, span[0], span[1], source.get("parameters") or {}))
        if not pieces or len({p.last - p.first for p in pieces}) != 1:
            raise UserError(
                f"slices[{i}].sources", [[p.first, p.last] for p in pieces], "each must have the same number of layers"
            )
        own = get(item["base_model"], f"slices[{i}].base_model") if item.get("base_model") else base
        out.append(Slice(tuple(pieces), item.get("parameters") or {}, own))
    return out


class _Reader:
    def __init__(self, document: Mapping, meaning: Meaning, base: Input | None, slices: list[Slice]):
        self.document, self.meaning, self.base, self.slices = document, meaning, base, slices
        self.whole = document.get("parameters") or {}
        self.known = {*meaning.each, *meaning.one, *meaning.flags, *(meaning.numbers or {}), *SILENT}
        for level in (self.whole, *(s.parameters for s in slices), *(p.parameters for s in slices for p in s.pieces)):
            for key in level:
                if key not in self.known:
                    raise UserError(
                        f"parameters.{key}",
                        level[key],
                        f"{document['merge_method']} has no such setting; {nearest(str(key), self.known)}",
                    )

    def dtype(self) -> torch.dtype | None:
        name = self.document.get("out_dtype") or self.document.get("dtype")
        if name is None:
            return None
        if str(name).removeprefix("torch.") not in DTYPES:
            raise UserError("dtype", name, nearest(str(name), DTYPES))
        return DTYPES[str(name).removeprefix("torch.")]

    def method(self, part: Slice, models: list[Piece]) -> Any:
        m, levels = self.meaning, [part.parameters, self.whole]
        options = dict(m.fixed)
        for key, (option, default) in m.each.items():
            options[option] = [_rules([p.parameters, *levels], key, default) for p in models]
        for key, (option, default) in m.one.items():
            options[option] = _rules([*(p.parameters for p in part.pieces), *levels], key, default)
        for key, (option, default) in m.flags.items():
            options[option] = _flag(levels, key, default)
        for key, option in (m.numbers or {}).items():
            if (value := _first(levels, key)) is not None:
                options[option] = value
        if m.part == "merge.model_stock":
            options["by"] = "row" if _flag(levels, "filter_wise", False) else "tensor"
        if _flag(levels, "rescale", False) and "rescale" not in m.flags:
            raise UserError(
                "parameters.rescale", True, f"{self.document['merge_method']} keeps entries as they are here; remove it"
            )
        return parts.build({m.part: options}, Merge, "merge_method")

    def order(self, part: Slice) -> tuple[Input | None, list[Piece]]:
        """The base, and the models in the order the method takes them."""
        base, pieces = part.base, list(part.pieces)
        if self.meaning.base == "among":
            return None, pieces
        if base is None and (self.meaning.base == "first" or self.meaning.part != "merge.multislerp"):
            raise UserError("base_model", None, f"{self.document['merge_method']} needs it")
        own = [p for p in pieces if base is not None and p.model is base]
        rest = [p for p in pieces if p not in own]
        if self.meaning.base == "first":
            own = own or [Piece(base, pieces[0].first, pieces[0].last, {})]
            if len(rest) != 1:
                raise UserError("models", len(rest), "slerp joins the base_model with one other")
            return None, [own[0], *rest]
        return base, rest

    def plan(self, inputs: list[Input]) -> Plan:
        first = self.base or self.slices[0].pieces[0].model
        vocabulary = Vocabulary.of(self.document, self.base, inputs)
        sliced = bool(self.document.get("slices"))
        jobs, layer = [], 0
        for i, part in enumerate(self.slices):
            base, pieces = self.order(part)
            method = self.method(part, pieces)
            if self.meaning.part == "merge.multislerp" and base is None:
                method = parts.build(
                    {"merge.multislerp": {"weights": method.weights, "normalise": method.normalise, "about": "zero"}}
                )
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
        described = {k: v for k, v in self.document.items()}
        spec, template = self.base.spec if self.base else None, self.document.get("chat_template")
        dtype = self.dtype() or natural(inputs)
        made = Plan(tuple(jobs), tuple(inputs), config, first.folder, described, vocabulary.tokenizer(), template, dtype, spec)
        return made.check()


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


def _rules(levels: list[Mapping], key: str, default: float) -> Any:
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
    return [*rules, {"value": default}] if rules else default


def _first(levels: list[Mapping], key: str) -> Any:
    return next((level[key] for level in levels if level.get(key) is not None), None)


def _flag(levels: list[Mapping], key: str, default: bool) -> bool:
    value = _first(levels, key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UserError(f"parameters.{key}", value, "give true or false")
    return value
