"""A second network beside a language model that foresees its mistakes.

    into, inner, error = trace(model, tokens, blocks)      what the model took in, thought and got wrong
    said = errors.predict(into, inner, error, segments, positions)         said[t]: the error to come at token t + 1

Shapes: into, inner (rows, T, D): the input of the first block, and the mean over the blocks of what they put out. error
(rows, T, V): onehot(ids[t]) - softmax of what predicted ids[t], at tokens with weight, else 0; it sums to 0. Everything at or
before t is seen, nothing after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temperament.nn import forward
from temperament.nn.batch import Tokens
from temperament.nn.forward import Model
from temperament.nn.pieces import Around, Under
from temperament.nn.taps import taps


def states(model: Model, tokens: Tokens, blocks: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(into, inner, logits) of one forward."""
    module = forward.module_of(model)
    with forward.active(model), taps(module, blocks[:1], at="input") as first, taps(module, blocks) as out:
        logits = model(**forward.inputs(model, tokens)).logits
        return first[blocks[0]], sum(out[b] for b in blocks) / len(blocks), logits


@torch.no_grad()
def trace(model: Model, tokens: Tokens, blocks: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(into, inner, error), without gradient: what foresees the errors never moves what makes them."""
    into, inner, logits = states(model, tokens, blocks)
    said = F.pad(logits[:, :-1].softmax(-1, dtype=torch.float32), (0, 0, 1, 0))
    error = F.one_hot(tokens.ids, logits.shape[-1]).float() - said
    return into.float(), inner.float(), error * (tokens.weights != 0)[..., None]


def beside(model: nn.Module) -> ErrorModel | None:
    """The one that now hangs on a model, if one does and it is on."""
    for module in model.modules():
        for piece, switch in module.__dict__.get("_pieces", ()):
            if isinstance(piece, ErrorModel) and switch.on:
                return piece
    return None


class ErrorModel(Around):
    """Blocks like the model's over the sequence of errors; every second one looks at what the model took in and thought.

    It changes nothing that the module it hangs on says. `leave` is zero at the start: no mistake is foreseen.
    """

    starts_at_zero = True

    def __init__(self, vocabulary: int, width: int, layers: int, **sizes: Any):
        super().__init__()
        self.enter, self.leave = nn.Linear(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
        self.layers = nn.ModuleList(Layer(width, **sizes, looks=bool(k % 2)) for k in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        nn.init.zeros_(self.leave.weight)

    def forward(self, base: Under, *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs)

    def predict(self, into: Tensor, inner: Tensor, error: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
        """(rows, T, V)"""
        here = torch.arange(segments.shape[1], device=segments.device)
        sees = (segments[:, :, None] == segments[:, None, :]) & (here[:, None] >= here)  # (rows, T, T)
        x, memory = self.enter(error), torch.cat([into, inner], 1)
        for layer in self.layers:
            x = layer(x, memory, sees[:, None], positions)
        return self.leave(self.norm(x))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, head: int, inner: int, theta: float, looks: bool):
        super().__init__()
        self.heads, self.kv_heads, self.head, self.theta, self.looks = heads, kv_heads, head, theta, looks
        lin = lambda a, b: nn.Linear(a, b, bias=False)
        self.q, self.o = lin(width, heads * head), lin(heads * head, width)
        self.k, self.v = lin(width, kv_heads * head), lin(width, kv_heads * head)
        self.gate, self.up, self.down = lin(width, inner), lin(width, inner), lin(inner, width)
        self.before, self.between = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)

    def forward(self, x: Tensor, memory: Tensor, sees: Tensor, positions: Tensor) -> Tensor:
        """x (rows, T, D); memory (rows, 2 T, D); sees (rows, 1, T, T)."""
        h = self.before(x)
        seen, at = (self.before(memory), positions.repeat(1, 2)) if self.looks else (h, positions)
        apart = lambda y, n: y.unflatten(-1, (n, self.head)).transpose(1, 2)
        q, k, v = apart(self.q(h), self.heads), apart(self.k(seen), self.kv_heads), apart(self.v(seen), self.kv_heads)
        q, k = turned(q, positions, self.theta), turned(k, at, self.theta)
        mask = sees.repeat(1, 1, 1, 2) if self.looks else sees
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.heads != self.kv_heads)
        x = x + self.o(out.transpose(1, 2).flatten(2))
        h = self.between(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def turned(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary positions: x (rows, heads, T, d), positions (rows, T)."""
    half = x.shape[-1] // 2
    rates = theta ** (-torch.arange(half, device=x.device) / half)
    angle = (positions[:, None, :, None] * rates).to(x.dtype)
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), x[..., 2 * half :]], -1)
