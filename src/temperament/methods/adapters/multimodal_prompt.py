from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from temperament.delta import Addition
from temperament.engine import see
from temperament.errors import UserError
from temperament.nn import draws
from temperament.nn.context import context, current
from temperament.nn.pieces import Around, Under
from temperament.parts import part, plain
from temperament.train.trained import Param, Trained

BARE = "without prompts"  # a condition of the forward: the tower as if nothing were put in


class Tower(Around):
    """Around an encoder: in that of captions it makes room for n tokens behind the first; at a strength between 0 and 1 the
    pooled features are (1 - strength) those without prompts + strength those with."""

    starts_at_zero = False

    def __init__(self, tokens: int, side: str):
        super().__init__()
        self.tokens, self.side = tokens, side

    def forward(self, base: Under, *args: Any, **inputs: Any) -> Any:
        if self.strength == 0 or _bare():
            return base(*args, **inputs)
        out = base(*args, **(self.longer(base, **inputs) if self.side == "text" else inputs))
        if self.strength != 1:
            with context(conditions={BARE: True}):
                plain = base(*args, **inputs).pooler_output
            out.pooler_output = plain + self.strength * (out.pooler_output - plain)
        return out

    def longer(self, base: Under, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> dict[str, Any]:
        n, rows = self.tokens, len(input_ids)
        if input_ids.shape[1] + n > (most := base.module.embeddings.position_embedding.weight.shape[0]):
            mend = f"captions and prompts have {most} positions together; give fewer tokens, or shorter captions"
            raise UserError("adapters.multimodal_prompt.tokens", n, mend)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        room = input_ids[:, :1].expand(rows, n)  # what stands there is replaced; the first token is no end of a caption
        put = lambda t, new: torch.cat([t[:, :1], new, t[:, 1:]], 1)
        return {"input_ids": put(input_ids, room), "attention_mask": put(mask, torch.ones_like(room)), **more}


class Prompt(Around):
    """At the embeddings of a tower or before one of its blocks: n vectors in the place of the room's, or at the end.

    prompt (n, width); of a tower that follows another, W p + b with p the other's prompt of this depth."""

    starts_at_zero = False

    def __init__(self, side: str, first: bool, prompt: Tensor | None, of: Prompt | None = None, width: int = 0):
        super().__init__()
        self.side, self.first = side, first
        self.__dict__["of"] = of  # not as a module of this one: it has its own place, where versions find its tensor
        if of is None:
            self.prompt = nn.Parameter(prompt)
        else:
            self.couple = nn.Linear(of.prompt.shape[1], width)

    def value(self) -> Tensor:
        return self.prompt if self.of is None else self.couple(self.of.prompt)

    def forward(self, base: Under, *args: Any, **inputs: Any) -> Any:
        if self.strength == 0 or _bare():
            return base(*args, **inputs)
        value = self.value()
        if not self.first:
            return base(self.put(args[0], value, len(value)), *args[1:], **inputs)
        out = base(*args, **inputs)
        if self.side == "text":  # the new words have their positions like any other
            value = value + base.module.position_embedding.weight[1 : 1 + len(value)]
        return self.put(out, value, len(value) if self.side == "text" else 0)

    def put(self, h: Tensor, value: Tensor, old: int) -> Tensor:
        """h (rows, T, width) with the prompt in the place of `old` tokens."""
        new = value.to(h).expand(len(h), *value.shape)
        if self.side == "text":
            return torch.cat([h[:, :1], new, h[:, 1 + old :]], 1)
        return torch.cat([h[:, : h.shape[1] - old], new], 1)


def _bare() -> bool:
    return current().conditions.get(BARE) is True


@part("adapters.multimodal_prompt", papers=["013"], modalities=("image",))
@dataclass(frozen=True)
class MultimodalPrompt:
    """Learned tokens in both encoders of a model of pictures and captions; those of pictures follow from those of words.

        captions   [first, p_0, words, end];  before block i < depth the room of p_0 is given p_i         p_i (tokens, width)
        pictures   [class, patches, W_0 p_0 + b_0];  before block i < depth the last tokens are W_i p_i + b_i

    The model itself is frozen, and every caption makes room for `tokens` more positions. Never merges; travels as additions,
    the pictures' prompts as the vectors they have become. Strength 0 is the base, between 0 and 1 each encoder's pooled
    features are a mixture of those without and with prompts. Source: Khattak et al. 2023 (MaPLe); paper 013.
    """

    tokens: int = 2  # learned tokens of a caption, and of a picture
    depth: int = 9  # blocks that are given tokens of their own, the embeddings counted as the first; the most there are
    spread: float = 0.02  # of the first values

    def __post_init__(self):
        if self.tokens < 1 or self.depth < 1 or self.spread < 0:
            raise ValueError("tokens and depth must be at least 1, spread not negative")

    def build(self, base: Any, ctx: Any) -> Trained:
        component = next(iter(base.components))
        towers = {side: _tower(base, side) for side in ("text", "vision")}
        depth = min(self.depth, *(len(t.encoder.layers) for t in towers.values()))
        around: dict[str, tuple[nn.Module, Around]] = {}
        told, device = plain(self)[type(self).part_name], next(base.model.parameters()).device
        for side, tower in towers.items():
            around[f"{component}/{side}_model:room"] = (tower, Tower(self.tokens, side))
        widths = {side: base.model.config.get_text_config().hidden_size if side == "text" else
                  base.model.config.vision_config.hidden_size for side in towers}  # fmt: skip
        for i in range(depth):
            name = f"{component}/text_model:prompt.{i}"
            seed = lambda what, name=name: draws.generator(ctx.seed, f"{name}/{what}")
            value = self.spread * torch.randn(self.tokens, widths["text"], generator=seed("p"))
            text = Prompt("text", i == 0, value)
            vision = Prompt("vision", i == 0, None, text, widths["vision"])
            nn.init.normal_(vision.couple.weight, std=widths["text"] ** -0.5, generator=seed("W"))
            nn.init.zeros_(vision.couple.bias)
            for side, piece in (("text", text), ("vision", vision)):
                around[f"{component}/{side}_model:prompt.{i}"] = (_place(towers[side], i), piece.to(device))
        params = [
            Param(f"{name}/{key}", p, key.rpartition(".")[2], decay=key.endswith("weight"))
            for name, (_, piece) in around.items()
            for key, p in piece.named_parameters()
        ]
        return Trained(params=params, around=around, additions=lambda: {
            name: Addition(type(self).part_name, told, _kept(piece)) for name, (_, piece) in around.items()})  # fmt: skip

    def rebuild(self, base: Any, name: str, addition: Addition) -> tuple[nn.Module, Around]:
        path, _, what = name.partition("/")[2].partition(":")
        side = path.partition("_")[0]
        tower = _tower(base, side)
        if what == "room":
            return tower, Tower(self.tokens, side)
        i = int(what.partition(".")[2])
        return _place(tower, i), Prompt(side, i == 0, addition.tensors["prompt"].clone())


def _kept(piece: Around) -> dict[str, Tensor]:
    return {"prompt": piece.value().detach().clone()} if isinstance(piece, Prompt) else {}


def _tower(base: Any, side: str) -> nn.Module:
    tower = getattr(base.model, f"{side}_model", None)
    tower = getattr(tower, f"{side}_model", tower)
    if not see.dual(base) or not hasattr(tower, "embeddings") or not hasattr(getattr(tower, "encoder", None), "layers"):
        mend = "it has no two encoders of embeddings and blocks; use a CLIP, e.g. lab/clip"
        raise UserError("adapters.multimodal_prompt", base.id, mend)
    return tower


def _place(tower: nn.Module, i: int) -> nn.Module:
    return tower.embeddings if i == 0 else tower.encoder.layers[i]
