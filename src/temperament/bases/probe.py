"""What a base is asked to show that it is the same one: inputs of its kind, and what it says of them.

    asked = question(base)              keyword tensors, the same in every process
    Answer(base)(**asked)               (rows, ...) numbers: logits of tokens or classes; what a denoiser and its codec make

A certificate holds the answer of the live base against that of its files, loaded again elsewhere; the exactness check holds
a version against the base."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from temperament.engine import see
from temperament.engine.denoise import Denoiser
from temperament.engine.pictures import size_of
from temperament.errors import UserError
from temperament.nn import draws
from temperament.nn.forward import device_of

CAPTIONS = ["", "a red dog on the left of a house"]


def question(base: Any) -> dict[str, Tensor]:
    """UserError where nothing is known to ask of a base of this kind."""
    asked, rows = {}, torch.arange(2)
    if "denoiser" in base.components:
        denoiser = Denoiser.of(base)
        asked["x"] = draws.normal(0, "certificate", 0, rows, denoiser.shape)
        return asked | {"t": denoiser.process.times(torch.tensor([0.3, 0.7]))}
    if see.names_pictures(base):
        asked["pixel_values"] = draws.normal(0, "certificate", 0, rows, (3, *_side(base)))
    speaks = base.tokenizer is not None or hasattr(getattr(base.model, "config", None), "vocab_size")
    if not speaks and not asked:
        mend = "it can not be reloaded and compared; the change itself lies in the run's folder delta/"
        raise UserError("run", base.id, mend)
    if base.tokenizer is not None or not asked or see.dual(base):
        text = base.model.config.get_text_config()
        length = torch.arange(min(24, getattr(text, "max_position_embeddings", None) or 24))
        asked["input_ids"] = draws.randint(text.vocab_size, 0, "certificate", 0, rows[:, None], length[None])
        if getattr(base.model.config, "is_encoder_decoder", False):
            asked["decoder_input_ids"] = asked["input_ids"].flip(1)[:, :8]
    return asked


def _side(base: Any) -> tuple[int, int]:
    """(H, W) of its pictures; of a net of convolutions that does not say, what all of them take."""
    try:
        return size_of(base)
    except UserError:
        return 64, 64


class Answer(nn.Module):
    """The base as one function of its question."""

    def __init__(self, base: Any):
        super().__init__()
        self.parts = nn.ModuleDict(base.components)
        self._base = [base]  # (in a list: it is no module)

    def forward(self, **asked: Tensor) -> Tensor:
        base = self._base[0]
        device = device_of(base.model)
        asked = {name: t.to(device) for name, t in asked.items()}
        if "x" not in asked:
            out = base.model(**asked)
            return getattr(out, "logits", out[0])
        denoiser, x, t = Denoiser.of(base), asked["x"], asked["t"]
        said = denoiser(x, t, denoiser.encode(CAPTIONS))
        return torch.cat([said.flatten(1), denoiser.pixels(x).flatten(1)], 1).float()
