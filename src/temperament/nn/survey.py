"""Reading the places off a module tree: which lists are stacks of blocks, what each weight does, how heads share it.

Structure first: a stack is a list of composite modules; a container is an attention or an MLP; a fused weight is recognised by
its shape. Names decide the rest (`naming.py`). Nothing here knows a model by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from temperament.errors import UserError
from temperament.nn import naming as n
from temperament.nn.places import Block, Place


def _diffuses(model: nn.Module) -> bool:
    """A model of the diffusers library, told without importing it."""
    return hasattr(model, "config_name") and not hasattr(model, "get_input_embeddings")


def component_name(model: nn.Module) -> str:
    """What a lone model is called as a component: "lm", "denoiser", "codec", else "model"."""
    if _diffuses(model):
        return "codec" if "Autoencoder" in type(model).__name__ else "denoiser"
    heads = getattr(model, "get_output_embeddings", None)
    return "lm" if heads is not None and heads() is not None else "model"


@dataclass(frozen=True)
class Stack:
    """A run of blocks: the path of the list, its name, and (path, module) of every block in order."""

    path: str
    name: str
    blocks: tuple[tuple[str, nn.Module], ...]


def survey(components: Mapping[str, nn.Module]) -> tuple[list[Place], list[Block]]:
    places: list[Place] = []
    blocks: list[Block] = []
    owners: dict[int, str] = {}
    for component, model in components.items():
        if "/" in component or not component:
            raise UserError("component", component, "a component's name is one word without '/'")
        stacks = find_stacks(model)
        for stack in stacks:
            blocks += [Block(component, stack.name, d, f"{component}/{path}", module, len(blocks) + d)
                       for d, (path, module) in enumerate(stack.blocks)]
        found = [p for owner in _owners(model) for p in _places(component, model, owner, stacks)]
        if not any(p.role == "head" for p in found):  # a plain network: the last map, if after all blocks, is its head
            last = max((i for i, p in enumerate(found) if p.depth is not None or p.kind in ("linear", "conv")), default=0)
            if found and found[last].depth is None and found[last].role in ("other", "conv"):
                found[last] = replace(found[last], role="head", where="after")
        found = _with_heads(found, model)
        downs = {_beside(p.path): p for p in found if p.role == "down"}
        found = [_fused(p, downs.get(_beside(p.path)), model) for p in found]
        for p in found:
            first = owners.setdefault(id(p.parameter(next(iter(p.parameters)))), p.name)
            places.append(p if first == p.name else replace(p, tied_to=first))
    return places, blocks


# --- stacks ----------------------------------------------------------------------------------------------------------------


def find_stacks(model: nn.Module) -> list[Stack]:
    """The outermost lists of composite modules, in the order they run."""
    found: list[Stack] = []
    for path, blocks in _lists(model, ""):
        owner, root = model, path.rpartition(".")[0]
        for part in root.split(".") if root else []:
            inner = getattr(owner, part)
            owner = inner if hasattr(inner, "config") else owner
        config = getattr(owner, "config", None)
        name = n.stack_name(path, str(getattr(config, "model_type", "")), str(getattr(owner, "main_input_name", "")),
                            causal=_causal(blocks), diffuses=_diffuses(model), known=config is not None)
        same = sum(s.name == name or re.fullmatch(rf"{name}\d+", s.name) is not None for s in found)
        found.append(Stack(path, name if not same else f"{name}{same + 1}", tuple(blocks)))
    return sorted(found, key=lambda s: n.STACK_ORDER.get(s.name.rstrip("0123456789"), 0))


def _causal(blocks: list[tuple[str, nn.Module]]) -> bool:
    """Attention that says it is causal; or says nothing, but has a place in a cache (BLOOM masks in the model)."""
    modules = [m for _, b in blocks for m in b.modules()]
    said = [m.is_causal for m in modules if isinstance(getattr(m, "is_causal", None), bool)]
    return any(said) if said else any(isinstance(getattr(m, "layer_idx", None), int) for m in modules)


def _lists(module: nn.Module, path: str) -> Iterator[tuple[str, list[tuple[str, nn.Module]]]]:
    for name, child in module.named_children():
        at = f"{path}.{name}" if path else name
        if name == "mid_block":
            yield at, [(at, child)]
        elif _is_stack(child):
            elements = [(f"{at}.{k}", e) for k, e in child.named_children() if next(e.parameters(), None) is not None]
            stages = [_stage(e) for _, e in elements] if name not in ("down_blocks", "up_blocks") else [None]
            if all(stages):  # a list of stages (Swin, ResNet): number the blocks through
                elements = [(f"{p}.{inner}.{k}", e) for (p, stage), inner in zip(elements, stages, strict=True)
                            for k, e in stage.get_submodule(inner).named_children()]
            yield at, elements
        else:
            yield from _lists(child, at)


def _composite(module: nn.Module) -> bool:
    return sum(bool(m._parameters) and any(p is not None for p in m._parameters.values()) for m in module.modules()) >= 2


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    elements = [e for e in module.children() if next(e.parameters(), None) is not None]
    if not elements or not all(_composite(e) for e in elements):
        return False
    return isinstance(module, nn.ModuleList) or (len(elements) >= 2 and len({type(e) for e in elements}) == 1)


def _stage(element: nn.Module) -> str | None:
    """The list inside a stage: a direct child, of one class, holding most of its parameters."""
    size = sum(p.numel() for p in element.parameters())
    for name, child in element.named_children():
        if _is_stack(child) and name != "experts" and len({type(e) for e in child.children()}) == 1 \
                and sum(p.numel() for p in child.parameters()) > 0.6 * size:
            return name
    return None


# --- places ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Owner:
    """A module with its own parameters, and the modules above it, nearest first, as (attribute name, module)."""

    path: str
    module: nn.Module
    above: tuple[tuple[str, nn.Module], ...]


def _owners(model: nn.Module) -> Iterator[Owner]:
    def walk(module, path, above):
        if any(p is not None for p in module._parameters.values()):
            yield Owner(path, module, above)
        for name, child in module._modules.items():
            if child is not None:
                here = path.rpartition(".")[2]
                yield from walk(child, f"{path}.{name}" if path else name, ((here, module), *above))

    yield from walk(model, "", ())


def _kind(owner: Owner) -> str:
    m, kind = owner.module, type(owner.module).__name__
    names = {k for k, p in m._parameters.items() if p is not None}
    if not names <= {"weight", "bias"} or "weight" not in names:
        return "parameter"
    if owner.above and isinstance(owner.above[0][1], nn.MultiheadAttention):
        return "parameter"  # torch reads its out_proj without calling it
    if isinstance(m, nn.Linear):
        return "linear"
    if kind == "Conv1D" and m.weight.dim() == 2:
        return "conv1d"
    if isinstance(m, _ConvNd):
        return "conv"
    if isinstance(m, nn.Embedding):
        return "embedding"
    return "norm" if m.weight.dim() == 1 and re.search("norm", kind + owner.path.rpartition(".")[2], re.I) else "parameter"


def _places(component: str, model: nn.Module, owner: Owner, stacks: list[Stack]) -> Iterator[Place]:
    kind = _kind(owner)
    own = {k for k, p in owner.module._parameters.items() if p is not None}
    whole = "weight" in own and own <= {"weight", "bias"}
    groups: dict[str, dict[str, str]] = {}
    for name, parameter in owner.module._parameters.items():
        if parameter is None:
            continue
        stem, which = name, "weight"
        other = name.removesuffix("_bias")  # in_proj_weight and in_proj_bias, gate_up_proj and gate_up_proj_bias
        for partner in (other, f"{other}_weight"):
            if name.endswith("_bias") and partner in owner.module._parameters:
                stem, which = partner, "bias"
        if whole:
            stem, which = "", name
        groups.setdefault(stem, {})[which] = name
    for stem, names in groups.items():
        path = ".".join(x for x in (owner.path, stem) if x)
        joined = f"{component}/{owner.path}." if owner.path else f"{component}/"
        weight = getattr(owner.module, names.get("weight") or names["bias"])
        block = next(((s, d) for s in stacks for d, (at, _) in enumerate(s.blocks) if f"{path}.".startswith(f"{at}.")), None)
        role, cross = _role(model, owner, path, kind, block is not None, weight.dim())
        shape, transposed, experts = tuple(weight.shape), False, None
        if kind == "linear":
            shape = (owner.module.out_features, owner.module.in_features)  # also right for packed (quantised) weights
        elif kind in ("conv1d", "embedding") or isinstance(owner.module, _ConvTransposeNd):
            shape, transposed = (shape[1], shape[0], *shape[2:]), True
        elif kind == "parameter" and weight.dim() == 3 and role in ("gate", "up", "down", "gate_up"):
            experts, transposed = shape[0], bool(getattr(owner.module, "is_transposed", False))
            shape = (shape[0], shape[2], shape[1]) if transposed else shape
        stack, depth, where = (block[0].name, block[1], "in") if block else _outside(path, role, kind, stacks)
        yield Place(
            name=f"{component}/{path}", role=role, kind=kind, shape=shape, module=owner.module,
            parameters={which: joined + name for which, name in names.items()}, stack=stack, depth=depth, where=where,
            cross=cross, stream="context" if n.CONTEXT_STREAM.search(path) else "", experts=experts, transposed=transposed)


def _container(chain: tuple[tuple[str, nn.Module], ...]) -> str:
    """ "attention", "mlp" or "": the nearest container above wins; lists are none."""
    for name, module in chain:
        kind = type(module).__name__
        if isinstance(module, nn.ModuleList) or not name:
            continue
        named = n.ATTENTION_NAME.search(name) and not name.endswith("attentions")
        if isinstance(module, nn.MultiheadAttention) or (
            (named or n.ATTENTION_CLASS.search(kind)) and not n.NOT_ATTENTION.search(kind)
        ):
            return "attention"
        if n.MLP_NAME.search(name) or n.MLP_CLASS.search(kind):
            return "mlp"
    return ""


def _role(model: nn.Module, owner: Owner, path: str, kind: str, in_block: bool, dim: int) -> tuple[str, bool]:
    """The role, and whether it is of a cross-attention."""
    leaf, parts = path.rpartition(".")[2], path.split(".")
    chain = ((owner.path.rpartition(".")[2], owner.module), *owner.above) if kind == "parameter" else owner.above
    where = _container(chain)
    cross = where == "attention" and any(
        n.CROSS.search(f"{name} {type(m).__name__}") or getattr(m, "is_cross_attention", False) is True
        for name, m in chain[:3] if n.ATTENTION_NAME.search(f"{name} {type(m).__name__}") and not isinstance(m, nn.ModuleList))
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if owner.module is output:
        return "head", False
    if kind == "norm":
        if where == "attention":
            q_or_k = re.search(r"(^|_)(q|k|query|key)(_|$)", re.sub(r"added_|layer", "_", leaf))
            if q_or_k:
                return f"{q_or_k[2][0]}_norm", cross
        return "norm", False
    if kind == "embedding" or (kind == "parameter" and dim >= 1 and n.TOKEN.search(leaf)) \
            or (kind == "parameter" and n.POSITION.search(leaf)):
        return _embedding_role(path, leaf, kind), False
    if kind == "conv" and n.PATCH.search(f"{path} {type(owner.above[0][1]).__name__}"):
        return "patch", False
    if kind == "linear" and not in_block and n.PATCH.search(leaf):
        return "patch", False
    if n.SCALE.search(leaf) and kind == "parameter":
        return "scale", False
    if n.MODULATION.search(path) and (in_block or len(parts) < 3):
        return "modulation", False
    for part in reversed(parts):
        if n.CONDITION.search(part):
            return "condition", False
        if n.TIME.search(part):
            return "time", False
    if not in_block and any(n.PROJECTOR.search(p) for p in parts):
        return "projector", False
    if kind != "conv" and where == "attention":
        role = n.role_in(n.IN_ATTENTION, path)
        if role == "qkv" and cross and leaf == "c_attn":
            role = "kv"  # GPT-2's cross-attention: q_attn makes the queries
        return role or "other", cross
    headed = not in_block and any(n.HEAD.search(p) for p in parts)
    if headed and where != "mlp":
        return "head", False
    if kind == "conv":
        return "conv", False
    if where == "mlp" or in_block:
        routes = leaf == "gate" and any(k == "experts" for k, _ in owner.above[0][1].named_children())
        if routes or "Router" in type(owner.module).__name__:
            return "router", False
        role = _mlp_role(owner, path)
        if role:
            return role, False
    if headed:
        return "head", False
    if leaf.startswith("proj"):
        return "proj", False
    return "other", False


def _mlp_role(owner: Owner, path: str) -> str | None:
    leaf = path.rpartition(".")[2]
    beside = {k for k, _ in owner.above[0][1].named_children()} if owner.above else set()
    if leaf == "w1":
        return "gate" if "w3" in beside else "up"
    role = n.role_in(n.IN_MLP, path)
    if role == "up" and leaf == "up" and "down" not in beside:
        return None
    if leaf == "proj_out" and "proj_mlp" in beside:
        return "o_down"  # one output map for attention and MLP side by side
    return role


def _embedding_role(path: str, leaf: str, kind: str) -> str:
    named = leaf if kind == "parameter" else ".".join(path.split(".")[-2:])
    if n.POSITION.search(leaf) or (kind == "embedding" and any(n.POSITION.search(p) for p in path.split(".")[-2:])):
        return "position"
    if kind == "parameter" and n.TOKEN.search(leaf):
        return "token"
    if n.TYPE.search(named):
        return "type"
    if n.CONDITION.search(path):
        return "condition"
    return "time" if n.TIME.search(leaf) else "embed"


def _outside(path: str, role: str, kind: str, stacks: list[Stack]) -> tuple[str, None, str]:
    """For a place in no block: the stack it belongs to and the side it lies on."""
    early = role in ("embed", "position", "patch", "token", "type", "condition", "time") or role == "conv" \
        or (role == "norm" and n.EMBEDDINGS.search(path) is not None)
    where = "before" if early else "after"
    if not stacks:
        return "", None, where
    parts = path.split(".")

    def shared(stack: Stack) -> int:
        """How many leading parts of the two paths agree."""
        return sum(accumulate((a == b for a, b in zip(parts, stack.path.split("."), strict=False)), min))

    named = [s for s in stacks if s.name in path or (s.name == "vision" and "visual" in path)]
    if role == "projector":
        named = [s for s in stacks if s.name in ("vision", "audio")] or named
    best = max(map(shared, named or stacks))
    near = [s for s in named or stacks if shared(s) == best]
    return (near[0] if early else near[-1]).name, None, where


# --- heads and fused weights -----------------------------------------------------------------------------------------------


def _attention_of(place: Place) -> str:
    """Places of one attention share this: the path up to the outermost attention word after the block."""
    parts = place.path.replace("to_out.0", "to_out").split(".")
    numbers = [i for i, p in enumerate(parts[:-1]) if p.isdigit()]
    start = numbers[-1] + 1 if numbers else 0
    for i in range(start, len(parts)):
        if n.ATTENTION_NAME.search(parts[i]):
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1])


def _first(sources: list[Any], names: str) -> int | None:
    for name in names.split():
        for source in sources:
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _with_heads(places: list[Place], model: nn.Module) -> list[Place]:
    groups: dict[str, list[Place]] = {}
    for p in places:
        if p.category == "attention":
            groups.setdefault(_attention_of(p), []).append(p)
    heads = {name: h for path, group in groups.items() for name, h in _heads(path, group, model).items()}
    of_block = {(p.stack, p.depth): heads[p.name] for p in places if p.role == "q" and p.name in heads}
    for p in places:  # Flux: one output map reads the attention of its block and the MLP beside it
        if p.role == "o_down" and (p.stack, p.depth) in of_block:
            heads[p.name] = of_block[p.stack, p.depth]
    of = {p.name: f"{p.component}/{path}" for path, group in groups.items() for p in group}
    known = {name: dict(zip(("heads", "kv_heads", "head_dim"), h, strict=True)) for name, h in heads.items()}
    return [replace(p, attention=of.get(p.name, ""), **known.get(p.name, {})) for p in places]


def _heads(path: str, group: list[Place], model: nn.Module) -> dict[str, tuple[int, int | None, int]]:
    """(heads, key heads, size of a head): from the module, checked against the shapes; else from the config."""
    by_role = {r: next((p for p in group if p.role == r and not p.stream), None) for r in ("q", "k", "qkv", "kv", "o")}
    container = model.get_submodule(path) if path else model
    modules = [container, *container.children(), *(p.module for p in group if p.kind == "parameter")]
    configs = [c for m in (*modules, model) if (c := getattr(m, "config", None)) is not None]
    if by_role["o"]:
        inner = by_role["o"].shape[-1]
    elif by_role["q"] or by_role["qkv"]:
        inner = by_role["q"].shape[0] if by_role["q"] else by_role["qkv"].shape[0] // 3
    else:
        return {}
    size = _first(modules, "head_dim head_size attention_head_size key_value_proj_dim dim_head")
    heads = _first(modules, "num_attention_heads num_heads n_heads n_head heads")
    if size and inner % size == 0 and (not heads or heads * size == inner):
        heads = inner // size
    else:
        heads = heads or _first(configs, "num_attention_heads n_head n_heads num_heads")
        if not heads or inner % heads:
            return {}
        size = inner // heads
    fused, width = by_role["qkv"], None
    if by_role["k"]:
        width = by_role["k"].shape[0]
    elif fused:
        width = (fused.shape[0] - inner) // 2
    elif by_role["kv"]:
        width = by_role["kv"].shape[0] // 2
    kv = width // size if width and width % size == 0 else None
    return {p.name: (heads, kv, size) for p in group}


def _beside(path: str) -> str:
    """The container a map shares with its partners (diffusers keeps its first map one level down, in `net.0`)."""
    return path.removesuffix(".0.proj") if path.endswith(".0.proj") else path.rpartition(".")[0]


def _fused(place: Place, down: Place | None, model: nn.Module) -> Place:
    """With the layout of its rows, when it holds several roles. A gate shows by its shape: twice as wide as `down` reads."""
    out = place.shape[-2] if len(place.shape) > 1 else 0
    if place.role == "qkv":
        if n.GROUPED.search(place.path) or getattr(place.module, "multi_query", None) is False:
            return replace(place, layout="grouped")
        q = place.heads * place.head_dim if place.heads else out // 3
        k = place.kv_heads * place.head_dim if place.kv_heads else out // 3
        if q + 2 * k != out:
            return place  # no known layout: it stays one piece
        return replace(place, layout="blocked", slices={"q": (0, q), "k": (q, q + k), "v": (q + k, out)})
    if place.role == "kv" and place.kv_heads and 2 * place.kv_heads * place.head_dim == out:
        return replace(place, layout="blocked", slices={"k": (0, out // 2), "v": (out // 2, out)})
    if place.role in ("up", "gate_up"):
        if place.role == "up" and not (down and len(down.shape) == len(place.shape) and out == 2 * down.shape[-1]):
            return place
        if getattr(place.module, "is_concatenated", True) is False:
            return replace(place, role="gate_up", layout="interleaved")
        owner = model.get_submodule(place.path.rpartition(".")[0]) if "." in place.path else model
        up_first = n.UP_FIRST.search(type(owner).__name__) or n.UP_FIRST_NAME.search(place.path)
        first, second = ("up", "gate") if up_first else ("gate", "up")
        return replace(place, role="gate_up", layout="blocked", slices={first: (0, out // 2), second: (out // 2, out)})
    return place
