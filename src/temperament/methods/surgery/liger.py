from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from temperament.delta import Addition
from temperament.errors import UserError
from temperament.nn.attention import Attend, Edit, Site, sites_at
from temperament.nn.context import intervening
from temperament.nn.pieces import Around, Under
from temperament.parts import part, plain
from temperament.train.trained import Trained

CHUNK = 16  # tokens whose decays are compared pair by pair


def gated_linear(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """S_t = diag(exp g_t) S_{t-1} + k_t v_t^T;   o_t = q_t S_t.   q, k, g (B, H, T, d), v (B, H, T, e); o (B, H, T, e).

    Chunk by chunk: decays inside a chunk are differences of sums and cannot overflow; the state goes from chunk to chunk.
    """
    T = q.shape[2]
    pad = -T % CHUNK
    q, k, v, g = (torch.nn.functional.pad(t, (0, 0, 0, pad)).unflatten(2, (-1, CHUNK)) for t in (q, k, v, g))
    G = g.cumsum(3)  # log decay from before the chunk to each token, (B, H, N, C, d)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    decay = (G[..., :, None, :] - G[..., None, :, :]).masked_fill(later[:, :, None], -torch.inf).exp()
    inside = torch.einsum("bhntd,bhntsd,bhnsd->bhnts", q, decay, k) @ v
    reads, writes = q * G.exp(), k * (G[..., -1:, :] - G).exp()
    state, before = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for n in range(q.shape[2]):
        before.append(state)
        state = G[:, :, n, -1, :, None].exp() * state + writes[:, :, n].transpose(-1, -2) @ v[:, :, n]
    return (inside + reads @ torch.stack(before, 2)).flatten(2, 3)[:, :, :T]


class LigerAttention(Around):
    """heads = share * linear + (1 - share) * softmax within a window; then the attention's own output projection."""

    def __init__(self, site: Site, maps: dict[str, nn.Module], window: int, share: float, gates: bool, normaliser: float):
        super().__init__()
        self.__dict__.update(site=site, maps=maps)  # of the base: called, never owned
        self.window, self.share, self.gates, self.normaliser = window, share, gates, normaliser

    def linear(self, hidden: Tensor, real: Tensor | None) -> Tensor:
        """(rows, T, heads, d): the gated linear recurrence on the attention's own q, k, v, without positions, in fp32."""
        site = self.site
        cut = lambda role: self.maps[role](hidden).unflatten(-1, (-1, site.head_dim)).transpose(1, 2).float()
        q, k, v = cut("q"), cut("k"), cut("v")
        if real is not None:
            v = v * real[:, None, :, None]
        k, v = (t.repeat_interleave(site.heads // t.shape[1], dim=1) for t in (k, v))
        g = torch.nn.functional.logsigmoid(k) / self.normaliser if self.gates else torch.zeros_like(k)
        return gated_linear(q.softmax(-1), k.softmax(-1), v, g).transpose(1, 2)

    def forward(self, base: Under, *args: Any, **kwargs: Any) -> Any:
        if self.strength == 0:
            return base(*args, **kwargs)
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length(getattr(self.site.module, "layer_idx", 0)):
            raise UserError("use_cache", True, "a linearised attention is decoded without this cache; set it to false")
        hidden, mask = args[0] if args else kwargs["hidden_states"], kwargs.get("attention_mask")
        real = None
        if mask is not None:  # a key that no query sees is padding
            seen = mask if mask.dtype == torch.bool else mask >= 0
            real = seen.any(1).any(1)
        linear = self.linear(hidden, real) if self.share else None

        def near(at: Any) -> Tensor:
            Q = at.query.shape[2]
            t = torch.arange(Q, device=at.query.device)
            far = t[:, None] - t >= self.window
            return torch.zeros(Q, Q, device=far.device).masked_fill(far, torch.finfo(at.query.dtype).min).to(at.query.dtype)

        def mix(heads: Tensor, at: Any) -> Tensor:
            return heads if linear is None else (1 - self.share) * heads + self.share * linear.to(heads.dtype)

        bias = near if hidden.shape[1] > self.window else None
        with intervening(Attend([self.site], Edit(bias=bias, heads=mix))):
            out = base(*args, **kwargs)
        if self.strength == 1:
            return out
        whole, first = base(*args, **kwargs), lambda o: o if isinstance(o, Tensor) else o[0]
        blend = first(whole) + self.strength * (first(out) - first(whole))
        return blend if isinstance(out, Tensor) else (blend, *out[1:])


@part("surgery.liger", papers=["109"], modalities=("text",))
@dataclass(frozen=True)
class Liger:
    """Liger: every attention becomes half a gated linear recurrence, half softmax in a sliding window, on its own weights.

        linear   S_t = diag(exp g_t) S_(t-1) + phi(k_t) v_t^T,  o_t = phi(q_t) S_t,  phi = softmax over features, no positions
                 g_t = logsigmoid(k_t) / 16: the gate is read off the keys, so nothing is added
        heads    share * linear + (1 - share) * softmax over the last `window` tokens; then the old output projection

    Nothing of it is trained: put it first in a stack, with `adapters.lora` on q, k, v to heal it. The start law is lossy: the
    converted model is not the base, which stays the version `base`, there as a teacher. Rows are not packed (the state runs
    through a row) and decoding computes the prefix anew. Source: Lan et al. 2025, Liger (paper 109), its GLA form.
    """

    window: int = 64  # tokens the softmax half looks back, itself included
    share: float = 0.5  # of the linear half; 0: a sliding window alone, 1: linear alone
    gates: bool = True  # false: no forgetting, plain linear attention
    normaliser: float = 16.0  # divides the log gate

    def __post_init__(self):
        if self.window < 1 or not 0 <= self.share <= 1 or self.normaliser <= 0:
            raise ValueError("window is at least 1, share in [0, 1], normaliser above 0")

    def build(self, base: Any, ctx: Any) -> Trained:
        around = {f"{name}:liger": self.around(base, name) for name in attentions(base)}
        options = plain(self)[type(self).part_name]
        return Trained(around=around, additions=lambda: {n: Addition(type(self).part_name, options, {}) for n in around})

    def rebuild(self, base: Any, name: str, addition: Addition) -> tuple[nn.Module, Around]:
        return self.around(base, name.rpartition(":")[0])

    def around(self, base: Any, name: str) -> tuple[nn.Module, Around]:
        site, maps = sites_at(base.components, name)[0], attentions(base)[name]
        return site.module, LigerAttention(site, maps, self.window, self.share, self.gates, self.normaliser)


def attentions(base: Any) -> dict[str, dict[str, nn.Module]]:
    """component/path of every self-attention in a block -> its q, k and v maps."""
    found: dict[str, dict[str, nn.Module]] = {}
    for p in base.places:
        if p.depth is not None and p.attention and not p.cross and p.role in ("q", "k", "v") and p.kind == "linear" and p.heads:
            found.setdefault(p.attention, {})[p.role] = p.module
    whole = {n: maps for n, maps in found.items() if len(maps) == 3}
    if not whole:
        raise UserError("surgery.liger", "the base", "no attention with q, k and v maps of their own is there")
    return whole
