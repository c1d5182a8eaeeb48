from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from temperament.engine.denoise import Denoiser, Hook, State, denoise, invert
from temperament.engine.pictures import Picture, size_of
from temperament.engine.rows import fingerprint
from temperament.errors import UserError
from temperament.nn.attention import At, Attend, Edit, Site, sites_at
from temperament.nn.context import intervening
from temperament.parts import part

KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@part("sample.style_injection", papers=["062"], modalities=("image",))
@dataclass(frozen=True)
class StyleInjection:
    """The style of one picture on the content of another, by what the network attends to; nothing is trained (StyleID).

        both pictures are walked back to noise (engine/denoise.py, `invert`), with no caption; in chosen self-attentions
        q of the content, k and v of the style are kept at every step. Then, from z = AdaIN(z_content, z_style), forward again:
        q' = gamma q_content + (1 - gamma) q,   heads = softmax(temperature q' k_style^T / sqrt(d)) v_style

    AdaIN per channel: (z_c - mean_c) / std_c * std_s + mean_s. gamma near 1 keeps the content, near 0 takes more of the style;
    a temperature above 1 sharpens maps that grow flat where q and k are of different pictures. Sampling is certain (eta 0)
    and without guidance, in as many steps as `sample.sampler` says (50 in the paper). Row i takes picture i of a folder, from
    the start again where there are fewer. What is kept takes memory: steps x attentions x 3 x pixels. Source: Chung et al. 2024
    (paper 062)."""

    style: str  # the picture whose style is taken: a file, or a folder of them
    content: str | None = None  # the picture that is kept: a file or a folder; none: what the model paints of the caption
    gamma: float = 0.75  # share of the content's own queries
    temperature: float = 1.5  # multiplies q k^T
    adain: bool = True  # begin with the style's mean and spread in each channel
    layers: list[str] = field(default_factory=list)  # attentions; none: the last two thirds of the decoder's self-attentions
    refine: int = 0  # further passes at each step back: with few steps, five or so keep the noise the size of noise

    def __post_init__(self):
        if not 0 <= self.gamma <= 1 or self.temperature <= 0 or self.refine < 0:
            raise ValueError("gamma is a share, temperature above 0, refine not negative")

    def fingerprint(self) -> str:
        return fingerprint(self.style) + (fingerprint(self.content) if self.content else "")

    def hooks(self, base: Any) -> list[Any]:
        files = {"style": found(self.style, "style")} | ({"content": found(self.content, "content")} if self.content else {})
        return [_Inject(self, chosen(base, self.layers), files)]


def chosen(base: Any, layers: Sequence[str]) -> list[Site]:
    """The attentions that are open: those named, or the last two thirds of the decoder's self-attentions."""
    mine = [s for s in sites_at(base.components, list(layers) or ["attention"]) if s.name.startswith("denoiser/")]
    if layers:
        return mine
    own = [s for s in mine if not s.cross]
    decoder = [s for s in own if s.stack == "up"]
    some = decoder or own
    return some[len(some) - math.ceil(2 * len(some) / 3) :]


def found(path: str, option: str) -> list[str]:
    place, where = Path(path).expanduser(), f"sample.style_injection.{option}"
    if place.is_file():
        return [str(place)]
    files = sorted(str(p) for p in place.iterdir() if p.suffix.lower() in KINDS) if place.is_dir() else []
    if not files:
        raise UserError(where, path, "no picture is there; give a picture or a folder of them (png, jpeg, webp, bmp)")
    return files


def adain(content: Tensor, style: Tensor) -> Tensor:
    """(rows, C, H, W): the content with the style's mean and spread in each channel."""
    mean, std = (lambda z: z.mean((2, 3), keepdim=True)), (lambda z: z.std((2, 3), keepdim=True, unbiased=False))
    return (content - mean(content)) / std(content).clamp(min=1e-8) * std(style) + mean(style)


class Kept:
    """Queries, keys and values of some attentions, by step."""

    def __init__(self, sites: list[Site]):
        self.sites, self.step = sites, 0
        self.found: dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]] = {}

    def at(self, step: int) -> None:
        self.step = step

    def recording(self) -> Any:
        """A context in which they are kept, of the step that `at` has named."""

        def keep(q: Tensor, k: Tensor, v: Tensor, at: At) -> tuple[Tensor, Tensor, Tensor]:
            self.found[self.step, at.site.name] = q, k, v
            return q, k, v

        return intervening(Attend(self.sites, Edit(qkv=keep)))


@dataclass
class _Inject(Hook):
    part: StyleInjection
    sites: list[Site]
    files: dict[str, list[str]]
    content: Kept | None = None
    style: Kept | None = None
    rows: Tensor | None = None  # which style each row takes
    state: State | None = None

    def begin(self, state: State) -> None:
        denoiser, part, steps = state.denoiser, self.part, len(state.times) - 1
        self.state = state
        state.sampler, painter = replace(state.sampler, eta=0.0, guidance=1.0), state.sampler
        if "content" in self.files:
            pictures, rows = self._read(denoiser, "content", state.ids)
            pictures = pictures[rows]
        else:
            pictures = denoise(denoiser, state.captions, painter, seed=state.seed, draw=state.draw, ids=state.ids).latents
        styles, self.rows = self._read(denoiser, "style", state.ids)
        self.content, ours = self._back(denoiser, pictures, steps)
        self.style, theirs = self._back(denoiser, styles, steps)
        state.x = adain(ours, theirs[self.rows]) if part.adain else ours
        state.captions, state.placed = [""] * len(ours), True
        state.conditions = state.read()

    def around(self, predict: Callable) -> Callable:
        edit = Edit(qkv=self.exchanged, temperature=1 / self.part.temperature)
        opened = Attend(self.sites, edit)

        def injected(*args: Any, **more: Any) -> Tensor:
            with intervening(opened):
                return predict(*args, **more)

        return injected

    def exchanged(self, q: Tensor, k: Tensor, v: Tensor, at: At) -> tuple[Tensor, Tensor, Tensor]:
        where = self.state.step, at.site.name
        ours, (_, key, value) = self.content.found[where][0], self.style.found[where]
        if len(q) != len(ours):
            mend = "another part changed the number of rows; leave that one out"
            raise UserError("inference", "sample.style_injection", mend)
        return torch.lerp(q, ours, self.part.gamma), key[self.rows], value[self.rows]

    def _back(self, denoiser: Denoiser, latents: Tensor, steps: int) -> tuple[Kept, Tensor]:
        kept = Kept(self.sites)
        with kept.recording():
            start = invert(denoiser, latents, steps=steps, refine=self.part.refine, tell=kept.at)
        return kept, start

    def _read(self, denoiser: Denoiser, which: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(latents of the pictures that are needed, which of them each row takes)."""
        files = self.files[which]
        needed, rows = (ids % len(files)).unique(return_inverse=True)
        size = size_of(denoiser.base)
        pixels = torch.stack([Picture(files[i]).pixels(size) for i in needed.tolist()])
        return denoiser.latents(pixels.to(denoiser.device)), rows.to(denoiser.device)
