from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from temperament.delta import Addition, Dense, Multiplied
from temperament.delta.use import new_value
from temperament.errors import UserError
from temperament.nn import draws
from temperament.nn.pieces import Around, Piece, Under
from temperament.parts import part, plain
from temperament.train.trained import Param, Trained


class Scaled(Piece):
    """y = W ((1 + A) * z) + b;   A (heads, d), z the heads side by side, (..., heads * d)."""

    def __init__(self, A: Tensor, transposed: bool):
        super().__init__()
        self.A, self.transposed = nn.Parameter(A), transposed

    def change(self) -> Multiplied:
        m = 1 + self.A.reshape(-1)
        return Multiplied(m[:, None] if self.transposed else m[None])

    def forward(self, x: Tensor, base: Under) -> Tensor:
        return base(x * (1 + self.A.reshape(-1)))


@part("adapters.head_scale", papers=["016"])
@dataclass(frozen=True)
class HeadScale:
    """A factor for every entry of every attention head, before the output projection: what LoFiT finds its heads by.

        z_h <- (1 + A_h) * z_h        A_h (d,) ~ N(0, std^2), for all heads of all layers; everything else frozen

    It merges into the output projection, whose columns are multiplied. LoFiT adds `regularizers.l1` with `of: new, per_entry:
    false` and weight 5e-4, and then scores a head by the length of A_h; see `adapters.head_offset`.
    Source: Yin et al. 2024, LoFiT: Localized Fine-tuning on LLM Representations (paper 016).
    """

    rate_factor: ClassVar = 100.0  # usual rate over full fine-tuning's

    std: float = 1e-3  # spread of A at the start; 0: begin at no change

    def build(self, base: Any, ctx: Any) -> Trained:
        trained = Trained()
        for place in outputs(base):
            name = place.parameters["weight"]
            noise = torch.randn(place.heads, place.head_dim, generator=draws.generator(ctx.seed, f"head_scale/{name}"))
            piece = Scaled(self.std * noise.to(place.weight), place.transposed)
            trained.pieces[name] = (place.module, piece)
            trained.params.append(Param(f"{name}:scale", piece.A, "scale", base.places.depth_of(name), decay=False))
        return trained


class Offset(Around):
    """y = W (z + v) + b, with v at the columns of some heads;   v (chosen heads, d)."""

    starts_at_zero = False

    def __init__(self, v: Tensor, heads: Tensor):
        super().__init__()
        self.v = nn.Parameter(v)
        self.register_buffer("heads", heads)

    def shift(self, width: int) -> Tensor:
        """(width,): v at its heads' columns, zero elsewhere."""
        columns = self.heads[:, None] * self.v.shape[1] + torch.arange(self.v.shape[1], device=self.v.device)
        return self.v.new_zeros(width).index_copy(0, columns.reshape(-1), self.v.reshape(-1))

    def forward(self, base: Under, x: Tensor) -> Tensor:
        return base(x + (self.strength * self.shift(x.shape[-1])).to(x.dtype))


@part("adapters.head_offset", papers=["016"])
@dataclass(frozen=True)
class HeadOffset:
    """LoFiT's second step: a trained vector added to the output of a few attention heads, before the output projection.

        z_h <- z_h + v_h        v_h (d,) ~ N(0, std^2), for the `count` heads that scored highest in the step `of`

    A head's score there is the length of what its columns of the output projection were multiplied by, less one: |A_h| of
    `adapters.head_scale`, whose factors are then dropped (give this step the start that one had). The change is a constant of
    each layer: it becomes the projection's bias where there is one, and is added beside the weights where there is none.
    `by: random` is the control with as many heads. Source: Yin et al. 2024, LoFiT (paper 016).
    """

    rate_factor: ClassVar = 200.0  # usual rate over full fine-tuning's

    of: str | None = None  # name of the step that trained adapters.head_scale
    count: int | None = None  # heads that are tuned
    share: float = 0.03  # or this share of all heads
    by: Literal["scale", "random"] = "scale"  # how heads are chosen
    std: float = 1e-3  # spread of v at the start; 0: begin at no change

    def __post_init__(self):
        if self.by == "scale" and self.of is None:
            raise ValueError("name the step that scored the heads: of: STEP")
        if not 0 < self.share <= 1 or (self.count is not None and self.count < 1):
            raise ValueError("share lies in (0, 1], count is at least 1")

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.of,) if self.by == "scale" else ()

    def build(self, base: Any, ctx: Any) -> Trained:
        trained, places = Trained(), outputs(base)
        chosen = self.choose(self.scores(base, ctx, places), ctx.seed)
        for place in places:
            heads = chosen.get(place.name)
            if heads is None:
                continue
            name = place.parameters["weight"]
            noise = torch.randn(place.heads, place.head_dim, generator=draws.generator(ctx.seed, f"head_offset/{name}"))
            offset = Offset(self.std * noise[heads].to(place.weight), heads.to(place.weight.device))
            trained.around[f"{place.name}:offset"] = (place.module, offset)
            trained.params.append(Param(f"{name}:offset", offset.v, "offset", base.places.depth_of(name), decay=False))
        biased = {p.name: p for p in places if p.bias is not None}
        held = lambda: [(n.rpartition(":")[0], n, o) for n, (_, o) in trained.around.items()]
        trained.changes = lambda: {biased[p].parameters["bias"]: self._bias(biased[p], o) for p, _, o in held() if p in biased}
        options = plain(self)[type(self).part_name]
        trained.additions = lambda: {
            n: Addition(type(self).part_name, options, {"v": o.v.detach().clone(), "heads": o.heads.clone()})
            for p, n, o in held() if p not in biased
        }  # fmt: skip
        return trained

    @torch.no_grad()
    def _bias(self, place: Any, offset: Offset) -> Dense:
        return Dense(place.matrix() @ offset.shift(place.shape[1]))

    def rebuild(self, base: Any, name: str, addition: Addition) -> tuple[nn.Module, Around]:
        place = base.places[name.rpartition(":")[0]]
        return place.module, Offset(addition.tensors["v"].to(place.weight), addition.tensors["heads"])

    @torch.no_grad()
    def scores(self, base: Any, ctx: Any, places: list[Any]) -> dict[str, Tensor]:
        """(heads,) of every output projection: | m_h - 1 |, m the factor of each column, found by least squares."""
        if self.by == "random":
            return {p.name: torch.zeros(p.heads) for p in places}
        delta, found = ctx.delta(self.of, "adapters.head_offset.of"), {}
        for p in places:
            name, W = p.parameters["weight"], p.matrix(p.weight.detach())
            if name not in delta.changes:
                mend = f"it did not change {name}; name a step of adapters.head_scale"
                raise UserError("adapters.head_offset.of", self.of, mend)
            now = p.matrix(new_value(delta, name, base.originals.get(name, p.weight.detach())))
            m = (now * W).sum(0) / (W * W).sum(0).clamp(min=1e-30)
            found[p.name] = (m - 1).view(p.heads, p.head_dim).norm(dim=1)
        return found

    def choose(self, scores: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Place -> its chosen heads, ascending; `count` in all."""
        heads = [(name, h) for name, s in scores.items() for h in range(len(s))]
        k = min(self.count or max(round(self.share * len(heads)), 1), len(heads))
        if self.by == "random":
            order = draws.permutation(len(heads), seed, "head_offset").tolist()
        else:
            flat = torch.cat(list(scores.values()))
            order = flat.argsort(descending=True, stable=True).tolist()
        chosen: dict[str, list[int]] = {}
        for i in sorted(order[:k]):
            chosen.setdefault(heads[i][0], []).append(heads[i][1])
        return {name: torch.tensor(h) for name, h in chosen.items()}


def outputs(base: Any) -> list[Any]:
    """The output projections that read attention heads."""
    found = [p for p in base.places if p.role == "o" and p.heads and p.head_dim and p.kind in ("linear", "conv1d")]
    if not found:
        raise UserError("adapters", "heads", "no output projection of this base reads attention heads that are known")
    return found
