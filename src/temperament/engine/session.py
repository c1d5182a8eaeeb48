"""A session: rows of text that one model extends step by step, with what it computed kept between steps.

    s = Session(model, [[5, 6, 7], [8, 9]])      prefill
    s.logits                                     (rows, V) float: what follows each row
    s.step(tokens)                               append one token a row
    s.extend([[4, 4], []])                       append lists; returns the log-probs of their tokens
    s.score([[4, 4], [3]])                       the same log-probs, appending nothing
    s.select([0, 0, 1]); s.fork([1])             keep / copy rows, repeats allowed: branches of a search
    s.rewind(2); s.rewind([0, 3])                drop the last tokens of each row

Shorter rows are padded on the left, and holes left by uneven rewinding are masked; positions count real tokens only. How
much of that a given architecture gets right is measured once per model, on a tiny batch, against each row alone and without a
cache; the first way that agrees is used:

    slab, prepared mask     preallocated keys and values; a decoding step is handed its finished mask
    slab                    the same, masks built by the model (sliding windows, alibi)
    own                     the cache that transformers chooses for the architecture (recurrent states, hybrids)
    none                    everything computed again at each step
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from temperament.errors import UserError
from temperament.nn import forward
from temperament.nn.forward import Model
from temperament.nn.pieces import arounds


class _SlabLayer(CacheLayerMixin):
    """Keys and values of one layer in one block of memory, written in place: (rows, heads, capacity, width)."""

    is_croppable = True

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.n = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        room = lambda x: x.new_empty(*x.shape[:2], max(self.capacity, x.shape[2]), x.shape[3])
        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.n + key_states.shape[2]
        if end > self.keys.shape[2]:
            self.capacity = 2 * end
            self.keys, self.values = self._picked(self.keys), self._picked(self.values)
        self.keys[:, :, self.n : end] = key_states
        self.values[:, :, self.n : end] = value_states
        self.n = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length  # transformers 5.0 gave positions
        return self.n + new, 0

    def get_seq_length(self) -> int:
        return self.n

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 5.0

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self._picked(self.keys, indices), self._picked(self.values, indices)

    def _picked(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        kept = x[:, :, : self.n] if indices is None else x[:, :, : self.n].index_select(0, indices)
        out = x.new_empty(*kept.shape[:2], max(self.capacity, self.n), x.shape[3])
        out[:, :, : self.n] = kept
        return out


@dataclass(frozen=True)
class How:
    """What was measured: which cache, whether a step may bring its own 4-D mask, and the width beyond which it may not."""

    cache: str  # slab | own | none
    prepared: bool = False
    window: int | None = None
    reason: str = ""


_measured: WeakKeyDictionary[nn.Module, dict[tuple, How]] = WeakKeyDictionary()


def how(model: Model) -> How:
    """The fastest way of decoding that agrees with no cache at all, for this model; measured at the first call."""
    module = forward.module_of(model)
    known = _measured.setdefault(module, {})
    with forward.active(model):
        state = arounds(module)
    if state not in known:
        known[state] = _measure(model)
    return known[state]


class Session:
    """See the module. room: columns to reserve. given: further inputs of the first forward (pixels; the source of an
    encoder-decoder). keep: how many of the prompts' last positions `tail` (rows, keep, V) shall hold. grad: keep
    the graph (with a cache that is not written in place).
    """

    def __init__(
        self,
        model: Model,
        prompts: list[list[int]],
        *,
        room: int = 64,
        given: dict[str, Tensor] | None = None,
        keep: int = 1,
        grad: bool = False,
        way: How | None = None,
    ):
        if any(len(p) == 0 for p in prompts):
            raise UserError("prompts", [], "begin every prompt with a token (the model's BOS where it has one)")
        self.model, self.grad, self.room = model, grad, room
        self.device = forward.device_of(model)
        self._how = way or how(model)
        if grad and self._how.cache == "slab":
            self._how = How("own")
        self._given, self._source = dict(given or {}), None
        if forward.kind(model) == "encoder-decoder":
            self._source = self._encode(self._given)
        self._takes_positions = forward.takes(model, "position_ids")
        self._takes_keep = forward.takes(model, "logits_to_keep")
        self._fill(prompts, keep)

    # ---- what there is ---------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        return len(self._lengths)

    @property
    def ids(self) -> list[list[int]]:
        """The tokens of each row, prompt included."""
        tokens, mask = self._tokens(), self._mask()
        if mask is None:
            return tokens.tolist()
        return [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]

    @property
    def logits(self) -> Tensor:
        """(rows, V): the model's logits for the next token of each row."""
        return self.tail[:, -1]

    # ---- moving ----------------------------------------------------------------------------------------------------------

    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens (rows,), one a row; the logits of what follows."""
        self.tail = self._feed(tokens[:, None], None)
        return self.logits

    def read(self, block: Tensor) -> Tensor:
        """Append block (rows, n); (rows, n, V): the logits after each of its tokens."""
        logits = self._feed(block, None, keep=block.shape[1])
        self.tail = logits[:, -1:]
        return logits

    def forget(self, counts: list[int]) -> None:
        """Drop the last tokens of each row; what follows is not known until something is appended."""
        if any(counts):
            self._drop(counts)

    def extend(self, continuations: list[list[int]]) -> list[Tensor]:
        """Append a list of tokens to each row (it may be empty); the log-prob of each of them, fp32."""
        width = max(map(len, continuations), default=0)
        if width == 0:
            return [self.tail.new_zeros(0) for _ in continuations]
        before = self.logits
        if self._how.window is not None and len({len(c) for c in continuations}) > 1:
            # a window counts columns, so holes would narrow it: set the rows anew, flush
            self._fill([a + b for a, b in zip(self.ids, continuations, strict=True)], keep=width + 1)
            logits = self.tail[:, -width - 1 :]
        else:
            block, real = _left_padded(continuations, self.device)
            tail = self._feed(block, real, keep=width)
            logits = torch.cat([before[:, None], tail], 1)
            rows = torch.arange(self.rows, device=self.device)
            lengths = torch.tensor([len(c) for c in continuations], device=self.device)
            logits[rows, width - lengths] = before  # what predicted the first token of each row
            self.tail = torch.where(lengths[:, None, None] == 0, before[:, None], tail[:, -1:])
        logp = logits[:, :-1].log_softmax(-1, dtype=torch.float32)
        block, _ = _left_padded(continuations, self.device)
        found = logp.gather(-1, block[:, :, None])[..., 0]
        self.tail = self.tail[:, -1:]
        return [row[width - len(c) :] for row, c in zip(found, continuations, strict=True)]

    def score(self, continuations: list[list[int]]) -> list[Tensor]:
        """The log-probs of each row's continuation, the session left as it was."""
        tail = self.tail
        found = self.extend(continuations)
        self._drop([len(c) for c in continuations])
        self.tail = tail
        return found

    def rewind(self, counts: int | list[int]) -> Tensor:
        """Drop the last `counts` tokens of every or of each row; the logits of what follows then."""
        counts = [counts] * self.rows if isinstance(counts, int) else counts
        if any(counts):
            shortest = min(int(n) - c for n, c in zip(self._lengths.tolist(), counts, strict=True))
            if shortest < 1:
                raise UserError("counts", max(counts), "rewind by less than the length of a row")
            left = [row[: len(row) - c] for row, c in zip(self.ids, counts, strict=True)]
            if not self._droppable(counts):
                self._fill(left, keep=1)
            else:
                self._drop([c + 1 for c in counts])
                self.tail = self._feed(torch.tensor([row[-1:] for row in left], device=self.device), None)
        return self.logits

    def select(self, rows: list[int] | Tensor) -> Self:
        """Keep these rows, in this order; a row named twice becomes two."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.device)
        mask = self._mask()
        self._blocks, self._lengths, self.tail = [self._tokens()[index]], self._lengths[index], self.tail[index]
        self._padding = None if mask is None else mask[index]
        self._bias = None
        if self._how.cache == "none":  # what was given is given again at each step
            self._given = {k: v[index.to(v.device)] for k, v in self._given.items()}
        if self._source is not None:
            self._source = type(self._source)(**{k: v[index] for k, v in self._source.items() if isinstance(v, Tensor)})
        elif self._cache is not None:
            self._cache.batch_select_indices(index)
        return self

    def fork(self, rows: list[int] | Tensor | None = None) -> Self:
        """A session of its own with these rows (default: all); this one stays as it is."""
        other = copy.copy(self)
        if self._cache is not None:
            other._cache = copy.deepcopy(self._cache) if self._how.cache == "own" else _shallow(self._cache)
        return other.select(range(self.rows) if rows is None else rows)

    # ---- the work --------------------------------------------------------------------------------------------------------

    def _fill(self, prompts: list[list[int]], keep: int) -> None:
        block, real = _left_padded(prompts, self.device)
        self._lengths = torch.zeros(len(prompts), dtype=torch.long, device=self.device)
        self._blocks: list[Tensor] = []
        self._padding: Tensor | None = None
        self._bias: Tensor | None = None
        self._n = 0  # columns so far
        capacity = block.shape[1] + self.room
        self._cache = None
        if self._how.cache == "slab":
            self._cache = Cache(layer_class_to_replicate=partial(_SlabLayer, capacity))
        elif self._how.cache == "own":
            self._cache = DynamicCache(config=forward.module_of(self.model).config)
        self.tail = self._feed(block, real, keep, first=True)

    def _tokens(self) -> Tensor:
        if len(self._blocks) > 1:
            self._blocks = [torch.cat(self._blocks, 1)]
        return self._blocks[0]

    def _mask(self) -> Tensor | None:
        """(rows, columns) bool, true on tokens; None if all are. Columns appended since it was set are real."""
        if self._padding is None:
            return None
        return nn.functional.pad(self._padding, (0, self._n - self._padding.shape[1]), value=True)

    def _feed(self, block: Tensor, real: Tensor | None, keep: int = 1, first: bool = False) -> Tensor:
        """Run the model over new columns; logits (rows, keep, V) of the last of them."""
        done, mask = self._n, self._mask() if real is not None else None
        self._blocks.append(block)
        self._n += block.shape[1]
        if real is not None:  # some of the new columns are padding
            old = mask if mask is not None else real.new_ones(len(real), done)
            self._padding = torch.cat([old, real], 1)
            self._bias = None
        if self._how.cache == "none" or self._source is not None:
            kwargs = self._whole()
        else:
            kwargs = {"input_ids": block, "past_key_values": self._cache, "use_cache": True}
            if self._padding is not None:
                kwargs["attention_mask"] = self._attention(done, block.shape[1])
                if self._takes_positions:
                    count = real.long().cumsum(1) - 1 if real is not None else torch.arange(block.shape[1], device=self.device)
                    kwargs["position_ids"] = (self._lengths[:, None] + count).clamp_min_(0)
            if first:
                kwargs |= self._given
        if self._takes_keep and keep < block.shape[1]:
            kwargs["logits_to_keep"] = keep
        with forward.active(self.model), nullcontext() if self.grad else torch.no_grad():
            logits = self.model(**kwargs).logits[:, -keep:]
        self._lengths = self._lengths + (block.shape[1] if real is None else real.sum(1))
        return logits

    def _attention(self, done: int, new: int) -> Tensor:
        window = self._how.window
        if new > 1 or not self._how.prepared or (window is not None and done + 1 > window):
            return self._mask().long()
        if self._bias is None or self._bias.shape[-1] < done + 1:
            dtype = forward.dtype_of(self.model)
            hidden = nn.functional.pad(~self._mask(), (0, self.room))
            self._bias = torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, torch.finfo(dtype).min)
            self._bias = self._bias[:, None, None]
        return self._bias[..., : done + 1]

    def _whole(self) -> dict[str, Any]:
        """One forward over everything, for what has no cache."""
        name = "decoder_" if self._source is not None else ""
        kwargs: dict[str, Any] = {name + "input_ids": self._tokens(), "use_cache": False}
        mask = self._mask()
        if mask is not None:
            kwargs[name + "attention_mask"] = mask.long()
            if forward.takes(self.model, name + "position_ids"):
                kwargs[name + "position_ids"] = (mask.long().cumsum(1) - 1).clamp_min_(0)
        if self._source is None:
            return kwargs | self._given
        passed = {k: v for k, v in self._given.items() if k == "attention_mask"}
        return kwargs | {"encoder_outputs": self._source} | passed

    def _encode(self, given: dict[str, Tensor]) -> Any:
        with forward.active(self.model), nullcontext() if self.grad else torch.no_grad():
            return forward.module_of(self.model).get_encoder()(**given)

    def _droppable(self, counts: list[int]) -> bool:
        """Whether these tokens can be forgotten in place: no recurrent state, no holes under a window that counts columns."""
        if self._how.cache == "own" and not self._cache.is_croppable:
            return False
        return self._how.window is None or len(set(counts)) == 1

    def _drop(self, counts: list[int]) -> None:
        """Forget the last tokens of each row, without computing what follows."""
        if not self._droppable(counts):
            return self._fill([row[: len(row) - c] for row, c in zip(self.ids, counts, strict=True)], keep=1)
        drop = torch.tensor(counts, device=self.device)[:, None]
        mask = self._mask()
        real = mask if mask is not None else torch.ones_like(self._tokens(), dtype=torch.bool)
        real = real & (real.flip(1).cumsum(1).flip(1) > drop)  # the count from the end is 1 at the last token of a row
        columns = int(real.any(0).nonzero().max()) + 1 if bool(real.any()) else 0
        cut, self._n = self._n - columns, columns
        self._blocks = [self._tokens()[:, :columns]]
        self._padding = None if bool(real[:, :columns].all()) else real[:, :columns]
        self._lengths = self._lengths - drop[:, 0]
        self._bias = None
        if self._how.cache == "own":
            self._cache.crop(-cut)
        elif self._cache is not None:
            for layer in self._cache.layers:
                layer.n -= min(cut, layer.n)


def _left_padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """ids (rows, longest), 0 in front of the shorter, and where they are real (None: everywhere)."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=device)
    lengths = [len(r) for r in rows]
    if min(lengths) == width:
        return ids, None
    return ids, torch.arange(width, device=device) >= width - torch.tensor(lengths, device=device)[:, None]


def _shallow(cache: Cache) -> Cache:
    """The same memory under layers of their own: selecting rows then copies it once, not twice."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


# ---- measuring ---------------------------------------------------------------------------------------------------------------


def _measure(model: Model) -> How:
    if forward.kind(model) == "encoder-decoder":
        return How("none", reason="an encoder-decoder is decoded without a cache")
    module = forward.module_of(model)
    window = forward.window(module)
    ids = forward.ordinary_ids(module)
    prompts, steps = [ids[:5], ids[5:8]], [ids[8:10], ids[10:12]]
    reason = ""
    with forward.measuring(module), forward.active(model):
        device = forward.device_of(model)
        alone = []
        for prompt, (one, two) in zip(prompts, steps, strict=True):
            logits = model(input_ids=torch.tensor([[*prompt, one, two]], device=device)).logits[0, -3:]
            alone.append(logits.float())
        want = torch.stack(alone)
        eps = max(torch.finfo(forward.dtype_of(model)).eps, torch.finfo(torch.float32).eps)  # norms compute in fp32 everywhere
        tolerance = (64 if eps < 1e-5 else 8) * eps * float(want.abs().max())
        slab = [How("slab", True, window), How("slab", False, window)]
        for way in (*slab, How("own", window=window), How("none", window=window)):
            try:
                s = Session(model, prompts, room=4, way=way)
                got = [s.logits]
                got += [s.step(torch.tensor(column, device=device)) for column in zip(*steps, strict=True)]
                picked = s.select([1, 0]).rows == 2
            except Exception as error:  # whatever an architecture says to a cache it does not know
                reason = reason or f"{type(error).__name__}: {error}"[:200]
                continue
            if picked and float((torch.stack(got, 1).float() - want).abs().max()) <= tolerance:
                return How(way.cache, way.prepared, window, reason)
            reason = reason or f"{way} disagrees with no cache"
    raise UserError("model", type(module).__name__, f"give a model that can be decoded with left padding ({reason})")
