"""One way into attention, in any model: read and replace what goes through it, at chosen places.

    edit = Edit(heads=lambda out, at: out * scale[:, None])
    with attend(model, blocks[2], edit):                  # or places, names, roles: the attentions they belong to
        model(**inputs)

Shapes, everywhere: q (rows, heads, Q, d);  k, v (rows, key heads, K, d), after projection, rotary positions and cache;
map (rows, heads, Q, K), softmax over K;  heads (rows, Q, heads, d), before the output projection.

    scores = q k^T scale / temperature + mask + bias;   map = softmax(scores);   heads = map v

Three doors, chosen by what the attention is made of: the attention registry of transformers (its own sdpa or eager function
is called with the edited inputs, so soft caps, sinks and position biases stay the model's); the call of
`scaled_dot_product_attention` inside any other module (the processors of diffusers, attentions of one's own); and, where a
model computes its scores by hand (BLOOM), the input of the output projection, for `heads` only. Where nothing is asked the
original function runs on the original inputs: bit for bit the model.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from temperament.errors import UserError
from temperament.nn.context import Intervention, current, intervening
from temperament.nn.places import Block, Place, Places
from temperament.nn.survey import component_name


@dataclass(frozen=True, eq=False)
class Site:
    """One attention of a model."""

    name: str
    module: nn.Module = field(repr=False)
    stack: str
    depth: int | None
    cross: bool
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    output: Place | None = field(repr=False, default=None)
    rotary: nn.Module | None = field(repr=False, default=None)


@dataclass(frozen=True)
class At:
    """Where an edit is called: its site, the number of the call in this `with`, and the query (once it is final)."""

    site: Site
    call: int
    query: Tensor | None = None


@dataclass(frozen=True)
class Extra:
    """Keys and values to attend to besides the model's own (a prefix, a memory, another image); they come first.

    key, value  (rows or 1, key heads, E, d)
    positions   (E,) or (rows, E): rotate the keys to these positions; None: as they are
    bias        broadcast to (rows, heads, Q, E), added to their scores; -inf: as if they were not there
    """

    key: Tensor
    value: Tensor
    positions: Tensor | None = None
    bias: Tensor | float = 0.0


@dataclass(frozen=True)
class Edit:
    """What to do at an attention; every field is optional. Order: qkv, temperature, extra, bias, map, heads."""

    qkv: Callable[[Tensor, Tensor, Tensor, At], tuple[Tensor, Tensor, Tensor]] | None = None
    temperature: float | Tensor | Callable[[At], float | Tensor] | None = None  # divides q k^T; a tensor broadcasts to q
    extra: Callable[[At], Extra | None] | None = None
    bias: Callable[[At], Tensor | float | None] | None = None  # broadcast to (rows, heads, Q, K), without the extra keys
    map: Callable[[Tensor, At], Tensor] | None = None
    heads: Callable[[Tensor, At], Tensor] | None = None

    @property
    def asks(self) -> tuple[str, ...]:
        return tuple(f for f in ("qkv", "temperature", "extra", "bias", "map", "heads") if getattr(self, f) is not None)


Where = str | Place | Block | Places | list


def sites_at(model: nn.Module | Mapping[str, nn.Module], where: Where) -> list[Site]:
    """The attentions that the places of `where` belong to, in the order of the model."""
    components = model if isinstance(model, Mapping) else {component_name(model): model}
    places = Places.of(components)
    names: set[str] = set()
    for item in [where] if isinstance(where, str | Place | Block) else where:
        if isinstance(item, str):
            exact = {p.attention for p in places if p.attention and item in (p.attention, p.attention.partition("/")[2])}
            names |= exact or {p.attention for p in places.match(item, field="attention")}
        else:
            chosen = item.places if isinstance(item, Block) else (item,)
            names |= {places[p.name].attention for p in chosen}
    groups: dict[str, list[Place]] = {}
    for p in places:
        if p.attention in names and p.attention:
            groups.setdefault(p.attention, []).append(p)
    if not groups:
        raise UserError("attention", str(where), "no attention is there; name places of one, or a block that holds one")
    return [_site(components, name, group) for name, group in groups.items()]


def _site(components: Mapping[str, nn.Module], name: str, group: list[Place]) -> Site:
    component, _, path = name.partition("/")
    root, first = components[component], group[0]
    output = next((p for p in group if p.role == "o" and not p.stream), None)
    rotary = [(p, m) for p, m in root.named_modules()
              if "RotaryEmbedding" in type(m).__name__ and f"{path}.".startswith(f"{p.rpartition('.')[0]}.".lstrip("."))]
    nearest_rotary = max(rotary, key=lambda found: len(found[0]))[1] if rotary else None
    return Site(name, root.get_submodule(path), first.stack, first.depth, any(p.cross for p in group), first.heads,
                first.kv_heads, first.head_dim, output, nearest_rotary)


class Attend(Intervention):
    """An edit at some sites, attached to the model through the door that fits each."""

    def __init__(self, sites: list[Site], edit: Edit):
        self.sites, self.edit, self._undo = sites, edit, []
        self.of = {id(m): s for s in sites for m in s.module.modules()}
        for site in sites:
            if _door(site) is _by_output and set(edit.asks) - {"heads"}:
                asked = next(a for a in edit.asks if a != "heads")
                raise UserError(f"attention.{asked}", site.name, f"{type(site.module).__name__} computes its scores by hand; "
                                "only `heads` can be edited there")

    def attach(self) -> None:
        for site in self.sites:
            _door(site)(site)

    def detach(self) -> None:
        for site in self.sites:
            _door(site)(site, close=True)


@contextmanager
def attend(model: nn.Module | Mapping[str, nn.Module], where: Where, edit: Edit) -> Iterator[list[Site]]:
    """Run with `edit` at these attentions. Nested edits apply one after the other at each stage, the outer first."""
    sites = sites_at(model, where)
    with intervening(Attend(sites, edit)):
        yield sites


def _asked(module: nn.Module) -> list[tuple[Edit, At]]:
    """The edits now in force at this attention."""
    now, found = current(), []
    for a in now.active:
        if isinstance(a, Attend) and (site := a.of.get(id(module))) is not None:
            found.append((a.edit, At(site, now.count((id(a), site.name)))))
    return [(edit, at) for edit, at in found if edit.asks]


# --- the attention itself --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of an attention: its inputs, and how the model itself would carry it out."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None  # bool (True: attend) or additive
    causal: bool  # what a mask of None stands for
    plain: Callable[..., tuple[Tensor, Any]]  # (q, k, v, mask, extra keys) -> heads (rows, Q, heads, d), map or None
    weigh: Callable[..., tuple[Tensor, Tensor]]  # the same with an additive mask, and always the map

    def additive(self) -> Tensor:
        """The mask as numbers to add, (1 or rows, 1 or heads, Q, K)."""
        q, k, mask = self.q, self.k, self.mask
        if mask is None:
            mask = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            mask = mask.tril() if self.causal and q.shape[2] > 1 else mask
        if mask.dtype != torch.bool:
            return mask
        return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)


def _carry_out(call: Call, asked: list[tuple[Edit, At]]) -> tuple[Tensor, Tensor | None]:
    """The attention under all edits: heads (rows, Q, heads, d) and the map where one was computed."""
    q, k, v = call.q, call.k, call.v
    for edit, at in asked:
        if edit.qkv is not None:
            q, k, v = edit.qkv(q, k, v, at)
    for edit, at in asked:
        if edit.temperature is not None:
            q = q / (edit.temperature(at) if callable(edit.temperature) else edit.temperature)
    asked = [(edit, replace(at, query=q)) for edit, at in asked]
    call, added = replace(call, q=q, k=k, v=v), 0
    for edit, at in asked:
        bias = edit.bias(at) if edit.bias is not None else None
        if bias is not None:
            call = replace(call, mask=call.additive() + F.pad(_four(bias, q, k.shape[2]), (added, 0)))
        extra = edit.extra(at) if edit.extra is not None else None
        if extra is not None:
            call, added = _with_extra(call, extra, at), added + extra.key.shape[2]
    if any(edit.map is not None for edit, _ in asked):
        out, probs = call.weigh(call.q, call.k, call.v, call.additive(), added)
        new = probs
        for edit, at in asked:
            new = edit.map(new, at) if edit.map is not None else new
        if new is not probs:
            probs, out = new, (new.to(call.v.dtype) @ _repeated(call.v, q.shape[1])).transpose(1, 2).contiguous()
    else:
        out, probs = call.plain(call.q, call.k, call.v, call.mask, added)
    for edit, at in asked:
        if edit.heads is not None:
            out = edit.heads(out, at)
    return out, probs


def _with_extra(call: Call, extra: Extra, at: At) -> Call:
    """The call with the extra keys and values before its own."""
    rows, keys = call.k.shape[0], extra.key.shape[2]
    key = extra.key if extra.positions is None else rotated(at.site, extra.key, extra.positions)
    key, value = (t.to(call.k.dtype).expand(rows, -1, -1, -1) for t in (key, extra.value))
    mask = call.additive()
    bias = _four(extra.bias, mask, keys)
    shape = torch.broadcast_shapes(mask.shape[:3], bias.shape[:3])
    mask = torch.cat([bias.expand(*shape, keys), mask.expand(*shape, -1)], dim=-1)
    return replace(call, k=torch.cat([key, call.k], dim=2), v=torch.cat([value, call.v], dim=2), mask=mask)


def _four(bias: Tensor | float, like: Tensor, keys: int) -> Tensor:
    """A bias as (rows or 1, heads or 1, Q or 1, keys)."""
    bias = torch.as_tensor(bias, dtype=like.dtype, device=like.device)
    bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
    return bias.expand(*bias.shape[:3], keys)


def _repeated(v: Tensor, heads: int) -> Tensor:
    return v if v.shape[1] == heads else v.repeat_interleave(heads // v.shape[1], dim=1)


def rotated(site: Site, key: Tensor, positions: Tensor) -> Tensor:
    """Keys turned to `positions` by the model's own rotary embedding. key (rows, key heads, E, d)."""
    turn = next((t for c in type(site.module).__mro__
                 if (t := getattr(sys.modules.get(c.__module__), "apply_rotary_pos_emb", None)) is not None), None)
    if turn is None or site.rotary is None:
        raise UserError("extra.positions", tuple(positions.shape), f"{site.name} has no rotary positions; leave them out")
    positions = positions.to(key.device).reshape(-1, positions.shape[-1])
    takes = inspect.signature(site.rotary.forward).parameters
    own = {"layer_type": site.module.layer_type} if "layer_type" in takes and hasattr(site.module, "layer_type") else {}
    cos, sin = site.rotary(key, positions, **own)
    return turn(key, key, cos, sin)[1]


# --- doors: how an edit reaches a model ------------------------------------------------------------------------------------

_OPEN: dict[tuple, list] = {}  # what is attached now: key -> [how often, how to undo]


def _shared(key: tuple, close: bool, attach: Callable[[], Callable[[], None]]) -> None:
    """Attach once for all edits that use the same door; undo with the last."""
    if close:
        _OPEN[key][0] -= 1
        if _OPEN[key][0] == 0:
            _OPEN.pop(key)[1]()
    elif key in _OPEN:
        _OPEN[key][0] += 1
    else:
        _OPEN[key] = [1, attach()]


def _door(site: Site) -> Callable[..., None]:
    if _registry(site.module) is not None:
        return _by_registry
    return _by_output if type(site.module).__module__.startswith("transformers.") else _by_function


def _from_file(module: nn.Module, name: str) -> Any:
    """What the file that defines this module (or a base class of it) calls `name`."""
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), name, None)
        if found is not None:
            return found
    return None


def _registry(module: nn.Module) -> Any:
    return _from_file(module, "ALL_ATTENTION_FUNCTIONS")


def _by_registry(site: Site, close: bool = False) -> None:
    """transformers: every function of the registry (and "eager", which is none) asks for edits first."""
    registry = _registry(site.module)

    def attach():
        before = dict(registry._local_mapping)
        for key in dict.fromkeys([*registry.valid_keys(), "eager"]):
            registry[key] = functools.partial(_registered, key, registry.get(key))

        def undo():
            for key in list(registry._local_mapping):
                del registry[key]
            for key, value in before.items():
                registry[key] = value

        return undo

    _shared(("registry", id(registry)), close, attach)


def _registered(key: str, own: Callable | None, module: nn.Module, q: Tensor, k: Tensor, v: Tensor,
                attention_mask: Tensor | None = None, **options):
    """Stands in for one attention function of transformers; the arguments are theirs."""
    eager = _from_file(module, "eager_attention_forward")
    own = own or eager
    asked = _asked(module)
    if not asked:
        return own(module, q, k, v, attention_mask, **options)
    if key not in ("eager", "sdpa") and any({"extra", "bias", "map"} & set(edit.asks) for edit, _ in asked):
        raise UserError("attn_implementation", key, "extra keys, a bias or a map need 'sdpa' or 'eager'; load the base so")

    def run(function, q, k, v, mask, added):
        fitted = dict(options)
        if added and fitted.get("position_bias") is not None:
            fitted["position_bias"] = F.pad(fitted["position_bias"], (added, 0))
        return function(module, q, k, v, mask, **fitted)

    said = options.get("is_causal")
    causal = key == "sdpa" and bool(getattr(module, "is_causal", True) if said is None else said)
    return _carry_out(Call(q, k, v, attention_mask, causal, functools.partial(run, own), functools.partial(run, eager)), asked)


def _by_function(site: Site, close: bool = False) -> None:
    """Any other module: its call of scaled_dot_product_attention is caught while it runs."""
    module = site.module

    def attach():
        before, forward = module.__dict__.get("forward"), module.forward

        @functools.wraps(forward)
        def edited(*args, **kwargs):
            asked = _asked(module)
            if not asked:
                return forward(*args, **kwargs)
            with _Catch(asked) as caught:
                out = forward(*args, **kwargs)
            if not caught.calls:
                raise UserError("attention", site.name, f"{type(module).__name__} does not use scaled_dot_product_attention")
            return out

        module.forward = edited

        def undo():
            if before is None:
                del module.forward
            else:
                module.forward = before

        return undo

    _shared(("function", id(module)), close, attach)


class _Catch(TorchFunctionMode):
    def __init__(self, asked: list[tuple[Edit, At]]):
        super().__init__()
        self.asked, self.calls = asked, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._attention(*args, **(kwargs or {}))

    def _attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        causal = is_causal and attn_mask is None

        def plain(q, k, v, mask, added):
            return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal and mask is None, scale=scale,
                                                  enable_gqa=enable_gqa).transpose(1, 2), None

        def weigh(q, k, v, mask, added):
            scores = q @ _repeated(k, q.shape[1]).transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
            probs = F.dropout(torch.softmax((scores + mask).float(), dim=-1).to(q.dtype), dropout_p, dropout_p > 0)
            return (probs @ _repeated(v, q.shape[1])).transpose(1, 2), probs

        return _carry_out(Call(query, key, value, attn_mask, causal, plain, weigh), self.asked)[0].transpose(1, 2)


def _by_output(site: Site, close: bool = False) -> None:
    """A model with attention by hand: its heads are met where the output projection reads them."""

    def attach():
        def hook(module, args):
            asked = _asked(site.module)
            if not asked:
                return None
            out = args[0].reshape(*args[0].shape[:-1], site.heads, site.head_dim)
            for edit, at in asked:
                out = edit.heads(out, at)
            return (out.reshape(args[0].shape), *args[1:])

        return site.output.module.register_forward_pre_hook(hook).remove

    _shared(("output", id(site.module)), close, attach)
