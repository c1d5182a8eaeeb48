"""How to call a language model of any family on a batch of tokens, and which of its outputs speaks of which token.

    kind              inputs                                        the output that predicts ids[t] stands at
    decoder           ids; causal, so right padding needs no mask   t - 1
    encoder-decoder   `given` (the source); ids shifted right       t
    masked            `given["input_ids"]` (ids with holes), mask   t

Packed rows need positions that restart and attention that ends at each document. Which arguments achieve this differs between
architectures (and versions of transformers), so it is measured, once for each model, on a tiny row of two documents: the
second must not change when the first does, and must say what it says alone.

A *view* is anything callable like the module that can be made current: a `module` attribute and `active()`, a context
manager (a new one each time). An `nn.Module` is the trivial view.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from temperament.errors import UserError
from temperament.nn.batch import Tokens
from temperament.nn.pieces import arounds

Kind = Literal["decoder", "encoder-decoder", "masked"]


@runtime_checkable
class View(Protocol):
    module: nn.Module

    def active(self) -> AbstractContextManager: ...

    def __call__(self, **inputs: Any) -> Any: ...


Model = nn.Module | View


def module_of(model: Model) -> nn.Module:
    """The model that knows its config and its output head, under any wrapping (view, DDP, compile, PEFT)."""
    if not isinstance(model, nn.Module):
        model = model.module
    while not hasattr(model, "get_output_embeddings") or hasattr(model, "get_base_model"):
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None), nn.Module):
            model = inner
        else:
            break
    return model


def active(model: Model) -> AbstractContextManager:
    """The context in which this version is the current one; entering the current one again does nothing."""
    if isinstance(model, nn.Module) or not hasattr(model, "active") or getattr(_current, "view", None) is model:
        return nullcontext()
    return _activated(model)


_current = threading.local()  # a backward may recompute in a thread of its own


@contextmanager
def _activated(view: View) -> Iterator[None]:
    before = getattr(_current, "view", None)
    with view.active():
        _current.view = view
        try:
            yield
        finally:
            _current.view = before


def head_of(model: Model) -> nn.Module | None:
    """The output head as a module (an adapter may wrap it, so its weight is nobody's business)."""
    get = getattr(module_of(model), "get_output_embeddings", None)
    return get() if get else None


def kind(model: Model) -> Kind:
    module = module_of(model)
    config = getattr(module, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    return "masked" if type(module).__name__ in _masked_names() and not getattr(config, "is_decoder", False) else "decoder"


@lru_cache
def _masked_names() -> frozenset[str]:
    from transformers.models.auto import modeling_auto as auto

    causal = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return frozenset(set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()) - causal)


def takes(model: Model, argument: str) -> bool:
    """Whether the model's forward names this argument."""
    return argument in arguments(type(module_of(model)).forward)


@lru_cache(maxsize=256)
def arguments(forward: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def device_of(model: Model) -> torch.device:
    return next(module_of(model).parameters()).device


def dtype_of(model: Model) -> torch.dtype:
    return next(p.dtype for p in module_of(model).parameters() if p.is_floating_point())


# ---- calling ---------------------------------------------------------------------------------------------------------------


def inputs(model: Model, tokens: Tokens, given: dict[str, Any] | Tokens | None = None) -> dict[str, Any]:
    """The keyword arguments for one forward over `tokens`; logits[:, t - shift(model)] then predicts ids[:, t].

    given: what the model sees besides (the source of an encoder-decoder, pixels, masked input ids); a Tokens is a source text.
    Raises UserError when rows are packed and the model cannot keep the documents apart.
    """
    if isinstance(given, Tokens):
        given = {"input_ids": given.ids, "attention_mask": given.mask.long()}
    given = dict(given or {})
    family = kind(model)
    if tokens.packed:
        how = packing(model)
        if how.by is None:
            raise UserError("packing", type(module_of(model)).__name__, f"pack nothing with this model ({how.reason})")
        return _packed_inputs(model, tokens, how) | given
    if family == "encoder-decoder":
        return {"decoder_input_ids": shift_right(model, tokens.ids), "use_cache": False} | given
    ids = {"input_ids": tokens.ids}
    if family == "masked":
        return ids | {"attention_mask": tokens.mask.long()} | given
    ids["use_cache"] = False
    if not bool(tokens.mask[:, 0].all()):  # left padding: nothing hides it but a mask
        ids["attention_mask"] = tokens.mask.long()
        if takes(model, "position_ids"):
            ids["position_ids"] = tokens.positions
    return ids | given


def shift(model: Model) -> int:
    """1 where the output at t - 1 predicts the token at t, else 0."""
    return int(kind(model) == "decoder")


def shift_right(model: Model, ids: Tensor) -> Tensor:
    """Decoder inputs for these labels: the start token (where none is named, padding, as in T5), then all but the last."""
    module = module_of(model)
    configs = (module.config, getattr(module, "generation_config", None))
    named = [getattr(c, name, None) for name in ("decoder_start_token_id", "pad_token_id") for c in configs]
    start = next((s for s in named if s is not None), None)
    if start is None:
        raise UserError("config.decoder_start_token_id", None, "set it: the decoder's first input is unknown")
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)


def window(module: nn.Module) -> int | None:
    """The narrowest window of any layer (None: all attend to everything)."""
    config = module.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and set(kinds) <= {"full_attention"}:
        return None
    if kinds is None and getattr(config, "use_sliding_window", True) is False:
        return None
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    sizes = [s for s in sizes if isinstance(s, int)]
    if not sizes and (kinds is None or set(kinds) <= {"attention"}):
        return None
    return min(sizes, default=0)


# ---- packing ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packing:
    """by: the arguments that keep documents apart: restarting positions alone, with a 4-D mask, or (None) nothing found."""

    by: Literal["positions", "mask"] | None
    offset: int = 0  # added to positions (RoBERTa counts from padding_idx + 1)
    reason: str = ""


_measured: WeakKeyDictionary[nn.Module, dict[tuple, Packing]] = WeakKeyDictionary()


def can_pack(model: Model) -> bool:
    return packing(model).by is not None


def packing(model: Model) -> Packing:
    """How this model keeps the documents of a packed row apart; measured at the first call."""
    module = module_of(model)
    known = _measured.setdefault(module, {})
    with active(model):
        state = arounds(module)
    if state not in known:
        known[state] = _measure_packing(model)
    return known[state]


def _packed_inputs(model: Model, tokens: Tokens, how: Packing) -> dict[str, Any]:
    out: dict[str, Any] = {"input_ids": tokens.ids, "position_ids": tokens.positions + how.offset}
    if kind(model) == "decoder":
        out["use_cache"] = False
    if how.by == "mask":
        out["attention_mask"] = document_mask(tokens.segments, kind(model) == "decoder", dtype_of(model))
    return out


def document_mask(segments: Tensor, causal: bool, dtype: torch.dtype) -> Tensor:
    """(rows, 1, T, T) to be added to scores: 0 within a document (and backwards, if causal), the lowest number elsewhere."""
    same = segments[:, :, None] == segments[:, None, :]
    if causal:
        same = same.tril()
    return torch.zeros(same.shape, dtype=dtype, device=segments.device).masked_fill_(~same, torch.finfo(dtype).min)[:, None]


def _measure_packing(model: Model) -> Packing:
    if kind(model) == "encoder-decoder":
        return Packing(None, reason="its source and cross-attention are one document a row")
    if not takes(model, "position_ids"):
        return Packing(None, reason="its forward takes no position_ids")
    module, device = module_of(model), device_of(model)
    plain = ordinary_ids(module)
    ids = torch.tensor([plain[:8]], device=device)
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]], device=device)
    other_first, other_own = ids.clone(), ids.clone()
    other_first[0, :4] = torch.tensor(plain[8:12], device=device)
    other_own[0, 4] = plain[12]
    batch = lambda ids, segments: Tokens(ids, torch.zeros_like(ids, dtype=torch.float), segments, torch.zeros_like(ids))
    call = lambda **kw: model(**kw).logits.float()[0, -4:]
    candidates = [Packing("positions")]
    if window(module) is None:  # one mask for all layers would open the windows
        candidates.append(Packing("mask"))
        if isinstance(pad := getattr(module.config, "pad_token_id", None), int):
            candidates.append(Packing("mask", offset=pad + 1))
    reason = ""
    with measuring(module), active(model):
        alone = call(**inputs(model, batch(ids[:, 4:], torch.zeros_like(segments[:, 4:]))))
        eps = max(torch.finfo(dtype_of(model)).eps, torch.finfo(torch.float32).eps)  # norms compute in fp32 everywhere
        tolerance = (64 if eps < 1e-5 else 8) * eps * float(alone.abs().max())
        for how in candidates:
            try:
                rows = (_packed_inputs(model, batch(x, segments), how) for x in (ids, other_first, other_own))
                packed, leak, own = (call(**row) for row in rows)
            except Exception as error:  # an architecture that does not take these arguments says so in its own way
                reason = reason or f"{type(error).__name__} with packed arguments"
                continue
            leaked = float((leak - packed).abs().max()) / max(float((own - packed).abs().max()), 1e-30)
            wrong = float((packed - alone).abs().max())
            if leaked < 1e-3 and wrong < tolerance:
                return how
            reason = "one document changes the next" if leaked >= 1e-3 else "a document packed differs from itself alone"
    return Packing(None, reason=reason)


def ordinary_ids(module: nn.Module) -> list[int]:
    """Thirteen unequal token ids that no part of the config calls special (cycled if the vocabulary is that small)."""
    special: set[int] = set()
    for c in (module.config, module.config.get_text_config()):
        for name, value in c.to_dict().items():
            if name.endswith(("token_id", "token_index")):
                special.update(value if isinstance(value, list) else [value])
    size = module.config.get_text_config().vocab_size
    found = [i for i in range(size - 1, -1, -1) if i not in special][:13]
    return (found * 13)[:13]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """No dropout; every submodule's mode as it was afterwards."""
    training = [m for m in module.modules() if m.training]
    try:
        for m in training:
            m.training = False
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def measuring(module: nn.Module) -> Iterator[None]:
    with evaluating(module), torch.no_grad():
        yield
