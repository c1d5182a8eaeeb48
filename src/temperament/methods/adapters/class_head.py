from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from temperament.delta import Addition
from temperament.engine import see
from temperament.errors import UserError
from temperament.nn import draws
from temperament.nn.classes import ClassHead, heads
from temperament.nn.pieces import Around
from temperament.parts import part
from temperament.protocols import Pictured
from temperament.train.trained import Param, Trained


@part("adapters.class_head", modalities=("image",))
@dataclass(frozen=True)
class Classes:
    """A linear head for new classes on the pooled features of an image base, beside the head it has.

        logits = W h + b;      h (rows, width) pooled features, logits (rows, classes);      W = b = 0 at the start by default

    The classes are those of a source (`of`), or are named. The base's own head stays, so what the base knew is measured with
    it on the tuned trunk. Stacked with a selection or an adapter, which tune the trunk; alone it is a linear probe. It never
    merges and travels as an addition; its strength multiplies the logits.
    """

    of: Pictured | None = None  # the source whose classes it names, e.g. data.digits
    classes: list[str] = field(default_factory=list)  # or their names, in the order of the labels
    name: str = "classes"  # what objectives call it
    gain: float = 0.0  # spread of W at the start, in units of 1 / sqrt(width); 0: every class is as likely

    def __post_init__(self):
        if (self.of is None) == (not self.classes):
            raise ValueError("name the classes: either the source they are `of`, or `classes`")
        if len(set(self.classes)) != len(self.classes) or len(self.classes) == 1:
            raise ValueError("classes must be two or more different names")
        if self.gain < 0 or not self.name or not self.name.isidentifier():
            raise ValueError("gain is not negative, name a plain word")

    def build(self, base: Any, ctx: Any) -> Trained:
        module, width = base.model, see.width(base)
        classes = self.of.classes(base) if self.of is not None else list(self.classes)
        if self.name in heads(module):
            raise UserError("adapters.class_head.name", self.name, "an earlier step hung a head of this name; give another")
        component = next(iter(base.components))
        address, piece = f"{component}/head.{self.name}", ClassHead(width, self.name, classes)
        nn.init.normal_(piece.linear.weight, std=self.gain / width**0.5, generator=draws.generator(ctx.seed, address))
        piece.to(next(module.parameters()).device)
        told = {"of": None, "classes": classes, "name": self.name, "gain": self.gain}
        params = dict(piece.linear.named_parameters())
        kept = lambda: {n: p.detach().clone() for n, p in piece.named_parameters()}
        return Trained(
            params=[Param(f"{address}:{n}", p, n, decay=n == "weight") for n, p in params.items()],
            around={address: (module, piece)},
            additions=lambda: {address: Addition(type(self).part_name, told, kept())},
        )

    def rebuild(self, base: Any, name: str, addition: Addition) -> tuple[nn.Module, Around]:
        piece = ClassHead(see.width(base), self.name, self.classes)
        piece.load_state_dict(dict(addition.tensors))
        return base.components[name.partition("/")[0]], piece
