from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temperament.delta import LowRank
from temperament.nn import context, draws
from temperament.nn.pieces import Piece, Under
from temperament.parts import part
from temperament.protocols import Start
from temperament.train.trained import Param, Trained


class LoRAPiece(Piece):
    """y = W x + s B A x;   A (rank, in, *kernel), B (out, rank)."""

    starts_at_zero = True

    def __init__(self, A: Tensor, B: Tensor, scale: float, layout: str, dropout: float, address: str):
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.scale, self.layout, self.dropout, self.address = scale, layout, dropout, address

    def change(self) -> LowRank:
        return LowRank(self.A, self.B, self.layout, scale=self.scale)

    def forward(self, x: Tensor, base: Under) -> Tensor:
        if self.layout == "embedding":
            return base(x) + self.scale * F.embedding(x, self.A.T) @ self.B.T
        address = context.current().draws if self.dropout else None  # only a training step has one
        z = x if address is None else draws.dropout(x, self.dropout, address.at(self.address))
        if self.A.dim() > 2:  # a convolution: A keeps the kernel, B is 1 x 1
            low = base.map(z, self.A)
            return base(x) + self.scale * torch.einsum("or,nr...->no...", self.B, low)
        frozen = not (base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad))
        # Under autocast torch casts operand by operand, which the fused node would bypass (there is no autocast on meta).
        cast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
        if (
            address is None
            and frozen
            and base.bare
            and not base.transposed
            and not cast
            and x.dtype == base.weight.dtype == self.A.dtype
        ):
            return _Fused.apply(x, base.weight, base.bias, self.A, self.B, self.scale)
        y = base(x)
        return y + self.scale * F.linear(F.linear(z.to(self.A.dtype), self.A), self.B).to(y.dtype)


class _Fused(torch.autograd.Function):
    """The frozen map and its low-rank share in one node, with n tokens and W (out, in). Of two orders of the same product each
    pass takes the cheaper:

        y = x (W + s B A)^T               the sum is made for the moment and never kept; n >= 2 in, backward n >= 2 out
        y = x W^T + s (x A^T) B^T         fewer tokens

    Only fp32 weights are summed: a narrower type would round a small change away. Saved are x and, in the second order, x A^T.
    No gradient for W and b.
    """

    @staticmethod
    def forward(ctx, x, W, b, A, B, scale):
        ctx.scale = scale
        if W.dtype == torch.float32 and x.numel() >= 2 * x.shape[-1] ** 2:
            ctx.save_for_backward(x, W, A, B)
            return F.linear(x, torch.addmm(W, B, A, alpha=scale), b)
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ A.T
        y = torch.addmm(b, flat, W.T) if b is not None else flat @ W.T
        y.addmm_(low, B.T, alpha=scale)
        ctx.save_for_backward(x, W, A, B, low)
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    def backward(ctx, g):
        x, W, A, B, *low = ctx.saved_tensors
        need_x, _, _, need_A, need_B, _ = ctx.needs_input_grad
        scale, flat, g = ctx.scale, x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        back = g @ B  # (n, rank)
        gx = gA = gB = None
        if need_x and W.dtype == torch.float32 and len(g) >= 2 * len(W):
            gx = (g @ torch.addmm(W, B, A, alpha=scale)).view(x.shape)
        elif need_x:
            gx = (g @ W).addmm_(back, A, alpha=scale).view(x.shape)
        if need_A:
            gA = (back.T @ flat).mul_(scale)
        if need_B:  # the thin factor first: a rank-wide output is the fast shape
            gB = ((low[0] if low else flat @ A.T).T @ g).mul_(scale).T
        return gx, None, None, gA, gB, None


@part("adapters.lora")
@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation: each target weight gets a trained product of two thin matrices.

        W' = W + s B A        A (rank, in) ~ kaiming uniform, B (out, rank) = 0        s = alpha / rank, or alpha / sqrt(rank)

    At the start the model is the base, bit for bit; merged, it has the base's shape. Targets are any linear map, GPT-2's
    Conv1D, convolutions and embeddings. Written in PEFT's layout. Source: Hu et al. 2022; rank-stabilised scale: Kalajdzievski
    2023.
    """

    rate_factor: ClassVar = 10.0  # usual rate over full fine-tuning's

    rank: int = 16  # width of the product
    alpha: float | None = None  # strength; default: 2 * rank
    targets: list[str] = field(default_factory=lambda: ["all-linear"])  # roles (q, v, mlp), module names, all-linear, regex
    rank_stabilised: bool = False  # s = alpha / sqrt(rank): high ranks keep their strength
    dropout: float = 0.0  # share of the adapter's input dropped while training
    lr_factor_B: float = 1.0  # rate of B over the rate of A (LoRA+: 16)
    init: Start | None = None  # how A and B begin and which ranks places get; none: A random, B zero

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout lies in [0, 1)")
        if (self.alpha is not None and self.alpha <= 0) or self.lr_factor_B <= 0:
            raise ValueError("alpha and lr_factor_B must be above 0: nothing would be learnt")

    @property
    def scale(self) -> float:
        return (self.alpha if self.alpha is not None else 2.0 * self.rank) / (
            math.sqrt(self.rank) if self.rank_stabilised else self.rank
        )

    def prepare(self, base: Any, ctx: Any, batches: Any) -> dict[str, Tensor]:
        """What the start wants to know of the data."""
        return self.init.prepare(base, ctx, batches, self.places(base), self.rank) if hasattr(self.init, "prepare") else {}

    def places(self, base: Any) -> list[Any]:
        return [
            p
            for p in base.places.match(self.targets, "adapters.lora.targets")
            if p.kind in ("linear", "conv1d", "conv", "embedding")
        ]

    def build(self, base: Any, ctx: Any) -> Trained:
        trained = Trained()
        for place in self.places(base):
            name = place.parameters["weight"]
            known = self.init is not None and (ctx.prepared or not hasattr(self.init, "prepare"))
            factors = self.init.factors(place, self.rank, ctx.prepared, ctx.seed) if known else self.initial(place, ctx.seed)
            if factors is None:
                continue
            A, B = factors
            layout = {"conv1d": "conv1d", "embedding": "embedding"}.get(place.kind, "linear")
            piece = LoRAPiece(A, B, self.scale, layout, self.dropout, name).to(place.weight.device)
            trained.pieces[name] = (place.module, piece)
            depth = base.places.depth_of(name)
            for role, partner, factor in (("A", "B", 1.0), ("B", "A", self.lr_factor_B)):
                tensor = getattr(piece, role)
                trained.params.append(
                    Param(f"{name}:{role}", tensor, role, depth, f"{name}:{partner}", self.scale, place.weight, factor)
                )
        return trained

    def initial(self, place: Any, seed: int) -> tuple[Tensor, Tensor]:
        """A uniform in +-1/sqrt(in) (kaiming with a = sqrt 5), addressed by the place; B zero. Ranks above the matrix' own are
        cut."""
        out, rest = place.shape[0], tuple(place.shape[1:])
        rank = min(self.rank, out, math.prod(rest))
        generator = draws.generator(seed, f"lora/{place.name}")
        A = torch.empty(rank, *rest).uniform_(-1, 1, generator=generator) / math.sqrt(math.prod(rest))
        return A.to(place.weight.dtype), torch.zeros(out, rank, dtype=place.weight.dtype)
