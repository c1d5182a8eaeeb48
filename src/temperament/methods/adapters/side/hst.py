from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temperament.delta import Addition
from temperament.engine import see
from temperament.errors import UserError
from temperament.nn import draws
from temperament.nn.classes import ClassHead, heads
from temperament.nn.context import context, current
from temperament.nn.pieces import Around, Under
from temperament.nn.taps import taps
from temperament.parts import part
from temperament.protocols import Pictured
from temperament.train.trained import Param, Trained


@part("adapters.side.hst", papers=["246"], modalities=("image",))
@dataclass(frozen=True)
class HST:
    """Hierarchical side-tuning: a small pyramid beside a vision transformer reads its blocks and names new classes.

        stem      conv 3x3 / 2, norm, relu, conv 2x2 / 2: 1/4 of the picture, width d_1; stages 2..S: conv 3x3 / 2, width d_i
        bridge    F = Lin_i(block's patches, resized),   g = LN(Lin_i(its meta token)),   t = mean of F        one Lin_i a stage
        block     x <- x + Attention(LN(x); keys and values g, t),    x <- x + F,    x <- x + MLP(LN(x))
        classes   W h + b,   h the normalised mean of the last stage's tokens (d_S,);   W = b = 0 at the start

    The blocks are dealt to the stages in order, as evenly as can be; each is read by one side block. A meta token (1, D) goes
    into each block before all others and is dropped behind it. Trained: the side network, the meta tokens, the norms inside
    the blocks, the head. The base's own head stays, on the trunk as the norms and tokens leave it. With `meta: false` the
    class token stands for them, and with `norms: false` besides the base is untouched and no gradient goes through it. In
    place of the paper's BatchNorms (in the stem, before the head) stand norms of each row alone, so that rows stay independent.
    It never merges, travels as additions, and its strength multiplies the logits and what the tokens change.
    Source: Lin et al. 2024, Hierarchical Side-Tuning for Vision Transformers (paper 246: ViT-B/16 with 0.78 million trained).
    """

    of: Pictured | None = None  # the source whose classes it names, e.g. data.digits
    classes: list[str] = field(default_factory=list)  # or their names, in the order of the labels
    name: str = "side"  # what objectives call it
    widths: list[int] = field(default_factory=lambda: [32, 48, 64, 72])  # of the stages
    heads: list[int] = field(default_factory=lambda: [2, 4, 8, 12])  # of attention in each stage; they divide the widths
    expand: float = 4.0  # of an MLP: inner width over its own
    meta: bool = True  # a token of its own in every block
    norms: bool = True  # train the norms inside the blocks

    def __post_init__(self):
        if (self.of is None) == (not self.classes):
            raise ValueError("name the classes: either the source they are `of`, or `classes`")
        if len(set(self.classes)) != len(self.classes) or len(self.classes) == 1:
            raise ValueError("classes must be two or more different names")
        if not self.name.isidentifier() or self.expand <= 0:
            raise ValueError("name must be a plain word, expand above 0")
        if not self.widths or len(self.widths) != len(self.heads):
            raise ValueError("widths must have a number for each stage, and heads one for each of them")
        if any(d < 1 or h < 1 or d % h for d, h in zip(self.widths, self.heads, strict=True)):
            raise ValueError("heads must divide the widths")

    def build(self, base: Any, ctx: Any) -> Trained:
        classes = self.of.classes(base) if self.of is not None else list(self.classes)
        if self.name in heads(base.model):
            raise UserError("adapters.side.hst.name", self.name, "an earlier step hung a head of this name; give another")
        blocks, component = self.blocks(base), next(iter(base.components))
        side = self.network(base, classes)
        address = f"{component}/side.{self.name}"
        begin(side, ctx.seed, address)
        around: dict[str, tuple[nn.Module, Around]] = {address: (base.model, side)}
        for block in blocks if self.meta else ():
            at = f"{block.name}:{self.name}"
            around[at] = (block.module, Meta(self.name, base.model.config.hidden_size))
            begin(around[at][1], ctx.seed, at)
        records = base.places.parameters()
        inner = {n: p for n, p in base.parameters() if self.norms and _norm_of_block(records[n][0])}
        params = [Param(n, p, n.rpartition(".")[2], base.places.depth_of(n), base=p, decay=False) for n, p in inner.items()]
        for at, (module, piece) in around.items():
            piece.to(next(module.parameters()).device)
            params += [Param(f"{at}:{n}", p, n.rpartition(".")[2], decay=p.dim() > 1) for n, p in piece.named_parameters()]
        told = {"of": None, "classes": classes, "name": self.name, "widths": self.widths, "heads": self.heads,
                "expand": self.expand, "meta": self.meta, "norms": self.norms}  # fmt: skip
        kept = lambda piece: {n: p.detach().clone() for n, p in piece.named_parameters()}
        return Trained(
            params=params,
            around=around,
            additions=lambda: {n: Addition(type(self).part_name, told, kept(p)) for n, (_, p) in around.items()},
        )

    def rebuild(self, base: Any, name: str, addition: Addition) -> tuple[nn.Module, Around]:
        token = set(addition.tensors) == {"token"}
        piece = Meta(self.name, base.model.config.hidden_size) if token else self.network(base, self.classes)
        piece.load_state_dict(dict(addition.tensors))
        module = next(b.module for b in self.blocks(base) if b.name == name.partition(":")[0]) if token else base.model
        return module, piece

    def network(self, base: Any, classes: Sequence[str]) -> Side:
        return Side(self, classes, [b.name for b in self.blocks(base)], base.model.config)

    def blocks(self, base: Any) -> list[Any]:
        blocks, config = base.places.blocks(), getattr(base.model, "config", None)
        if not see.own_classes(base) or not all(hasattr(config, n) for n in ("patch_size", "hidden_size")):
            mend = "it stands beside a vision transformer that names classes; use such a base, e.g. lab/vit"
            raise UserError("adapters.side.hst", base.id, mend)
        if len(blocks) < len(self.widths):
            mend = f"the base has {len(blocks)} blocks, one at least for each stage; give fewer widths and heads"
            raise UserError("adapters.side.hst.widths", self.widths, mend)
        return blocks


def _norm_of_block(place: Any) -> bool:
    return place.depth is not None and place.category == "norm"


class Meta(Around):
    """A token of its own in front of all others of a block; what the block makes of it is read and dropped."""

    def __init__(self, name: str, width: int):
        super().__init__()
        self.name, self.token = name, nn.Parameter(torch.zeros(1, width))

    starts_at_zero = False

    def forward(self, base: Under, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = base(torch.cat([self.token.to(hidden).expand(len(hidden), 1, -1), hidden], 1), *args, **kwargs)
        assert isinstance(out, Tensor), "a block that gives its hidden states"
        current().streams.setdefault(f"hst/{self.name}/meta", []).append(out[:, 0])
        out = out[:, 1:]
        if self.strength != 1:
            plain = base(hidden, *args, **kwargs)
            out = plain + self.strength * (out - plain)
        return out


class Side(ClassHead):
    """The side network with its head; it stands around the model and leaves what that says as it is."""

    def __init__(self, spec: HST, classes: Sequence[str], blocks: Sequence[str], config: Any):
        super().__init__(spec.widths[-1], spec.name, classes)
        self.blocks, self.meta, self.patch = tuple(blocks), spec.meta, _pair(config.patch_size)
        d, wide = spec.widths, config.hidden_size
        self.stage = [k * len(d) // len(blocks) for k in range(len(blocks))]
        self.stem = nn.Sequential(
            nn.Conv2d(getattr(config, "num_channels", 3), d[0], 3, 2, 1, bias=False),
            nn.GroupNorm(1, d[0]),
            nn.ReLU(),
            nn.Conv2d(d[0], d[0], 2, 2),
        )
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(d))
        self.enter = nn.ModuleList(nn.LayerNorm(n) for n in d)
        self.bridge = nn.ModuleList(nn.Linear(wide, n) for n in d)
        self.read = nn.ModuleList(SideBlock(d[i], spec.heads[i], spec.expand) for i in self.stage)
        self.leave = nn.ModuleList(nn.LayerNorm(n) for n in d)

    def forward(self, base: Under, *args: Any, **kwargs: Any) -> Any:
        pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        component = self.blocks[0].partition("/")[0]
        with context() as now:
            metas = now.streams[f"hst/{self.name}/meta"] = []
            with taps({component: base.module}, self.blocks, grad=True) as seen:
                out = base(*args, **kwargs)
            states = [seen[name] for name in self.blocks]
            asked = metas if self.meta else [h[:, 0] for h in states]
            last = self.maps(pixels, states, asked)[-1]
            h = last.flatten(2).mean(2)
            now.streams[f"hst/{self.name}"] = F.layer_norm(h, h.shape[1:])
        return out

    def maps(self, pixels: Tensor, states: Sequence[Tensor], asked: Sequence[Tensor]) -> list[Tensor]:
        """The map of each stage (rows, d_i, H_i, W_i). states (rows, tokens, D): of the blocks; asked (rows, D): what of each
        stands for the whole."""
        grid = [side // patch for side, patch in zip(pixels.shape[-2:], self.patch, strict=True)]
        x, found = pixels.to(self.linear.weight.dtype), []
        for i, enter in enumerate(self.enter):
            x = self.down[i - 1](x) if i else self.stem(x)
            size, x = x.shape[-2:], enter(x.flatten(2).transpose(1, 2))
            for state, whole, stage, block in zip(states, asked, self.stage, self.read, strict=True):
                if stage == i:
                    patches = state[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
                    fitted = F.interpolate(patches.to(x.dtype), size, mode="bilinear").flatten(2).transpose(1, 2)
                    x = block(x, self.bridge[i](fitted), self.bridge[i](whole.to(x.dtype)))
            x = self.leave[i](x).transpose(1, 2).unflatten(2, size)
            found.append(x)
        return found

    def reads(self, pooled: Tensor) -> Tensor:
        return current().streams.pop(f"hst/{self.name}")


class SideBlock(nn.Module):
    def __init__(self, width: int, heads: int, expand: float):
        super().__init__()
        self.heads, inner = heads, int(expand * width)
        self.whole, self.one, self.two = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.out = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor, patches: Tensor, asked: Tensor) -> Tensor:
        """x, patches (rows, n, d); asked (rows, d)."""
        x = x + self.attend(self.one(x), torch.stack([self.whole(asked), patches.mean(1)], 1))
        x = x + patches
        return x + self.out(F.gelu(self.up(self.two(x))))

    def attend(self, x: Tensor, keys: Tensor) -> Tensor:
        """x (rows, n, d) looks at keys (rows, 2, d)."""
        split = lambda t: t.unflatten(2, (self.heads, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(split(self.q(x)), split(self.k(keys)), split(self.v(keys)))
        return self.o(y.transpose(1, 2).flatten(2))


@torch.no_grad()
def begin(piece: nn.Module, seed: int, address: str) -> None:
    """First values, each by its address: matrices N(0, 0.02), convolutions He's by what goes out, the token Xavier's; norms and
    biases as torch has them, biases 0; the head says nothing."""
    for module_name, module in piece.named_modules():
        for key, p in module.named_parameters(recurse=False):
            generator = draws.generator(seed, f"{address}/{module_name}.{key}")
            if key == "token":
                bound = math.sqrt(6 / (p.shape[0] + p.shape[1]))
                p.uniform_(-bound, bound, generator=generator)
            elif module_name == "linear" or key == "bias":
                p.zero_()
            elif p.dim() > 1:
                std = math.sqrt(2 / (p.shape[0] * p.shape[2:].numel())) if p.dim() == 4 else 0.02
                p.normal_(std=std, generator=generator)


def _pair(side: int | Sequence[int]) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else tuple(side)
