from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from temperament.engine import see
from temperament.engine.augment import looked
from temperament.nn.batch import Images
from temperament.parts import number, part
from temperament.protocols import Pictured, Terms


@part("objectives.classify.class_texts", papers=["013"], modalities=("image",))
@dataclass(frozen=True)
class ClassTexts:
    """Classification by words, of a model of pictures and captions: the class whose text is nearest to the picture.

        loss = - log softmax_k( s <v(x'), t_k> )_label                                     mean over labelled pictures

    v, t: unit features; t_k: of the text of class k, `template` with its name in it; s = exp(logit scale). x' is a look at the
    picture (engine/augment.py), drawn anew each time the picture comes. Nothing is added to the model, so it may be asked for
    any other class afterwards. Source: Zhou et al. 2022 (CoOp); paper 013.
    """

    of: Pictured  # the source, whose classes are named
    batch: ClassVar = ("Images",)
    template: str = "a photo of a {}"  # the text of a class; {} is its name
    look: float = 1.0  # how far x' is from x; 0: not at all

    def __post_init__(self):
        if "{}" not in self.template:
            raise ValueError("template must hold {} where the class stands")
        if number(self.look, 0.0) < 0:
            raise ValueError("look must not be negative")

    def counts(self, whole: Images) -> dict[str, float]:
        return see.counted(whole)

    def loss(self, micro: Images, views: Any) -> Terms:
        base, model = views.live.base, views.model
        texts = see.text_features(model, base, [self.template.format(c) for c in self.of.classes(base)])
        pixels = looked(micro.pixels, micro.examples, views.seed, "one", self.look)
        logits = (see.scale(model) * see.image_features(model, base, pixels) @ texts.T).float()
        return see.named(logits, micro.labels)
