from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from temperament.engine.error_model import beside, states
from temperament.nn import forward
from temperament.nn.batch import Tokens
from temperament.parts import part


@part("decode.copilot", papers=["270"], modalities=("text",))
@dataclass(frozen=True)
class CopilotDecode:
    """Correct each next token by the mistake that the model's copilot foresees (adapters.copilot); without one it is the model.

        p~_i = max( p_i + lam f_i, 0 ) / sum         f_i: the copilot's guess at onehot(y_i) - p_i

    True errors are not known while decoding: the copilot reads its own guesses of the tokens before. lam 0 is the pilot; a
    guess that is right gives the right token for sure. Each token costs a forward of model and copilot over the whole text
    (nothing is cached). Source: Zou et al. 2025, Transformer Copilot (paper 270).
    """

    lam: float = 1.0  # how far the pilot is corrected

    def hooks(self, base: Any) -> list[Any]:
        return [Rectified(self.lam, base.places.blocks())]


@dataclass(frozen=True)
class Rectified:
    lam: float
    blocks: list[Any]

    def logits(self, state: Any) -> Tensor:
        model = next(iter(state.sessions.values())).model
        with forward.active(model):
            copilot = beside(forward.module_of(model))
            if copilot is None or not self.lam:
                return state.chosen
            said = foreseen(copilot, model, self.blocks, state)
        p = state.chosen.softmax(-1, dtype=torch.float32) + self.lam * copilot.strength * said
        return p.clamp(min=1e-12).log()


def foreseen(copilot: Any, model: Any, blocks: list[Any], state: Any) -> Tensor:
    """(rows, V): the error to come in each row; what was foreseen before is the copilot's input, and is filed by row."""
    texts = [p + ids for p, ids in zip(state.prompts, state.ids, strict=True)]
    known = state.scratch.setdefault("copilot", {row: [] for row in state.rows})
    lengths, device = torch.tensor([len(t) for t in texts]), state.chosen.device
    at = torch.arange(int(lengths.max()))
    ids = torch.tensor([t + [0] * (len(at) - len(t)) for t in texts], device=device)
    segments = torch.where(at < lengths[:, None], 0, -1).to(device)
    tokens = Tokens(ids, torch.zeros(ids.shape, device=device), segments, segments)
    into, inner, _ = states(model, tokens, blocks)
    error = torch.zeros(*ids.shape, state.chosen.shape[-1], device=device)
    for i, row in enumerate(state.rows):
        if known[row]:
            error[i, len(texts[i]) - len(known[row]) : len(texts[i])] = torch.stack(known[row])
    out = copilot.predict(into.float(), inner.float(), error, segments, tokens.positions)
    said = out[torch.arange(len(texts), device=device), lengths.to(device) - 1]
    for row, f in zip(state.rows, said, strict=True):
        known[row].append(f)
    return said
