from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from temperament.engine import see
from temperament.engine.augment import looked
from temperament.errors import UserError
from temperament.nn import draws
from temperament.nn.batch import Images
from temperament.parts import part
from temperament.protocols import Term, Terms


@part("regularizers.feature_consistency", papers=["013"], modalities=("image",))
@dataclass(frozen=True)
class FeatureConsistency:
    """What pictures and class names mean must stay what an untouched version makes of *other* looks and words for them.

        weight * [ mean_i (1 - cos(v(x'_i), v0(x''_i)))  +  mean_k (1 - cos(t(name_k), t0(description_k))) ]

    v, t: features of picture and text as they are now; v0, t0: of the version, without gradient. x', x'': two looks at one
    picture (engine/augment.py), the first that of objectives.classify.class_texts with the same `look`. description_k: one of
    the class's descriptions, drawn anew each step for all classes; without descriptions there is no second part, and the model
    need not read words. Each part lies in 0..2; `mse` takes |a - b|^2 of unit features instead, which is twice as much. Source:
    Roy and Etemad 2024 (paper 013: weight 8 and cosine).
    """

    per: ClassVar = "batch"
    weight: float = 8.0  # factor of both parts; may be a schedule
    version: str = "base"  # which version to stay near: base, start, ema, best
    descriptions: dict[str, list[str]] = field(default_factory=dict)  # other words for each class, by its name
    template: str = "a photo of a {}"  # the text of a class, as the objective has it
    look: float = 1.0  # how far the looks are from the picture; 0: not at all
    by: Literal["cosine", "mse"] = "cosine"  # the distance

    def __post_init__(self):
        if "{}" not in self.template:
            raise ValueError("template must hold {} where the class stands")
        if empty := [name for name, texts in self.descriptions.items() if not texts]:
            raise ValueError(f"descriptions has none of {empty[0]!r}")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.version,)

    def counts(self, whole: Images) -> dict[str, float]:
        if not isinstance(whole, Images):
            mend = "it compares features of pictures; use a source of pictures, e.g. data.sprites"
            raise UserError("regularizers.feature_consistency", type(whole).__name__, mend)
        n = float(len(whole))
        return {"consistency_image": n} | ({"consistency_text": n} if self.descriptions else {})

    def loss(self, micro: Images, views: Any) -> Terms:
        base, version, n = views.live.base, views.view(self.version), len(micro)
        one, two = (looked(micro.pixels, micro.examples, views.seed, name, self.look) for name in ("one", "two"))
        with torch.no_grad():
            then = see.features(version, base, two)
        terms = {"consistency_image": Term(self.apart(see.features(views.model, base, one), then), n, self.weight)}
        if self.descriptions:
            named = [self.template.format(name) for name in self.descriptions]
            with torch.no_grad():
                then = see.text_features(version, base, self.drawn(views))
            now = see.text_features(views.model, base, named)
            # It belongs to no row: each brings its share, so that a micro-batch of any size adds up to the mean over classes.
            terms["consistency_text"] = Term(n * self.apart(now, then).mean(), n, self.weight)
        return terms

    def drawn(self, views: Any) -> list[str]:
        """A description of each class, the same for all rows of a step."""
        step, classes = views.progress.step, torch.arange(len(self.descriptions))
        picked = draws.randint(1 << 30, views.seed, "description", step, classes).tolist()
        return [texts[k % len(texts)] for k, texts in zip(picked, self.descriptions.values(), strict=True)]

    def apart(self, now: Tensor, then: Tensor) -> Tensor:
        """(rows,)."""
        now, then = (torch.nn.functional.normalize(t.float(), dim=-1) for t in (now, then.detach()))
        return (now - then).square().sum(-1) if self.by == "mse" else 1 - (now * then).sum(-1)
