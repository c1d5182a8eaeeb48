from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from temperament.bases.frozen import frozen
from temperament.engine.speculate import speculate
from temperament.errors import UserError
from temperament.parts import part


@part("decode.eft", papers=["138"], modalities=("text",))
@dataclass(frozen=True)
class EFT:
    """Emulated fine-tuning: what tuning did to one model, added to the tokens of another; three or four models decode as one.

        log p(y_t) = log pi(y_t)  +  mix (log tuned(y_t) - log reference(y_t))
                                  +  (1 - mix) (log also(y_t) - log reference(y_t))  -  log Z_t

    pi is the model of the recipe (say, large and untuned), tuned and reference another one after and before its tuning (small):
    scale of knowledge from the one, behaviour from the other, nothing trained. With `also`, a second tuning of the same
    reference, `mix` blends two behaviours. tuned = reference gives pi; pi = reference gives tuned. All share one tokenizer.
    nucleus: tokens outside pi's are barred. draft > 0 lets `tuned` run so many tokens ahead; what is said stays the same
    (engine/speculate.py).
    Source: Mitchell et al. 2023 (paper 138).
    """

    tuned: str  # a base, a run folder or a model folder: the small model after its tuning
    reference: str  # and before
    also: str | None = None  # the small model after another tuning
    mix: float = 1.0  # share of `tuned`; the rest is that of `also`, where it is given
    nucleus: float = 1.0  # probability of pi within which tokens may come
    draft: int = 0  # tokens that `tuned` runs ahead; 0: none

    def __post_init__(self):
        if not 0 < self.nucleus <= 1 or self.draft < 0:
            raise ValueError("nucleus lies in (0, 1], and draft is not negative")
        if self.also and self.mix == 1:
            raise ValueError("mix must not be 1 where a model is named in `also`: it would count for nothing")

    def models(self, base: Any) -> dict[str, Any]:
        device = str(next(base.model.parameters()).device)
        named = {"tuned": self.tuned, "reference": self.reference, **({"also": self.also} if self.also else {})}
        found = {name: frozen(spec, device, "decode.eft") for name, spec in named.items()}
        for name, model in found.items():
            if model.model.config.get_text_config().vocab_size != base.model.config.get_text_config().vocab_size:
                raise UserError(
                    f"decode.eft.{name}", named[name], "it has another vocabulary; all models must share one tokenizer"
                )
        return {name: model.model for name, model in found.items()}

    def hooks(self, base: Any) -> list[Any]:
        return [] if self.draft else [_Combined(self)]

    @property
    def loop(self) -> Any:
        return partial(speculate, draft="tuned", ahead=self.draft, combine=self.combine) if self.draft else None

    def combine(self, logits: dict[str, torch.Tensor]) -> torch.Tensor:
        """(rows, V): logits of the emulated model."""
        z = {name: x.float() for name, x in logits.items()}
        out = z["model"] + self.mix * (z["tuned"] - z["reference"])
        if "also" in z:
            out = out + (1 - self.mix) * (z["also"] - z["reference"])
        if self.nucleus < 1:
            ordered, at = z["model"].softmax(-1).sort(dim=-1, descending=True, stable=True)
            outside = ordered.cumsum(-1) - ordered >= self.nucleus
            out = out.masked_fill(torch.zeros_like(outside).scatter(-1, at, outside), -torch.inf)
        return out


@dataclass(frozen=True)
class _Combined:
    part: EFT

    def logits(self, state: Any) -> torch.Tensor:
        return self.part.combine(state.logits)
