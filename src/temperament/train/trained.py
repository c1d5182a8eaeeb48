"""What a trainable part builds on a base: the tensors an optimizer steps, and how the change reads as a delta."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from temperament.delta import Change
from temperament.nn.pieces import Around, Piece


@dataclass
class Param:
    """A trained tensor and what optimizers and regularizers may want to know of it.

    name: "lm/model.layers.0.mlp.up_proj.weight", or "lm/....up_proj.weight:A" inside an adapter. role: "weight", "bias", or the
    adapter's own ("A", "B", "magnitude"). partner: name of the other factor. depth: block number, None outside the blocks.
    base: the tensor it changes, None for new ones. lr_factor: of the step's rate.

    A *packed* parameter trains some entries of `dense`, a weight of the base: tensor (k,) holds the values at the flat
    positions `entries` (k,), and moves says what becomes of the optimizer's state when the entries move (train/packed.py)."""

    name: str
    tensor: nn.Parameter
    role: str = "weight"
    depth: int | None = None
    partner: str | None = None
    scale: float = 1.0
    base: Tensor | None = None
    lr_factor: float = 1.0
    decay: bool = True
    dense: nn.Parameter | None = None
    entries: Tensor | None = None
    moves: Literal["carry", "reset"] = "carry"

    @property
    def held(self) -> nn.Parameter:
        """What versions, checkpoints and deltas hold: the tensor, or the whole weight a packed one lives in."""
        return self.tensor if self.dense is None else self.dense

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that is changed, packed or not: what tells a matrix from a vector."""
        return self.held.shape


def record(places: Any, name: str, place: Any, tensor: Tensor, **more: Any) -> Param:
    """Of a parameter of the base. Weight decay pulls on weights alone: on no bias, no norm."""
    role = "bias" if name.endswith("bias") else "weight"
    decay = role == "weight" and place.category != "norm"
    return Param(name, tensor, role, places.depth_of(name), decay=decay, **more)


def records(base: Any, keep: Callable[[Any], bool]) -> list[Param]:
    """Of the base's parameters at the places that `keep`; tied ones once."""
    at = base.places.parameters()
    known = [(name, at[name][0], tensor) for name, tensor in base.parameters() if name in at]
    return [record(base.places, name, place, tensor, base=tensor) for name, place, tensor in known if keep(place)]


@dataclass
class Trained:
    """What a trainable part leaves on the base. pieces: by parameter name of the base weight they change. around: what is no
    change of a weight, by the name its addition has in the delta ("lm/path:what"); `additions` gives those, and the part's
    `rebuild` hangs them on a base again. heads: modules that read the last hidden state (nn/heads.py), by name; they are no
    part of what the model says. terms: what its modules add to every loss, each like a regularizer (protocols.py), asked
    right after the objective so that what they left in the context's streams is of the objective's own forward.
    before_step(progress), after_step(progress): around the optimizer's step. reselect(progress): after it, the new entries
    of those packed parameters whose mask moves now, by name; the optimizer's state moves with them. What of the delta is no
    linear piece comes from `changes` and `additions`."""

    params: list[Param] = field(default_factory=list)
    pieces: dict[str, tuple[nn.Module, Piece]] = field(default_factory=dict)
    around: dict[str, tuple[nn.Module, Around]] = field(default_factory=dict)
    heads: dict[str, nn.Module] = field(default_factory=dict)
    terms: list[Any] = field(default_factory=list)
    before_step: Callable[[Any], None] | None = None
    after_step: Callable[[Any], None] | None = None
    reselect: Callable[[Any], dict[str, Tensor]] | None = None
    state: Callable[[], dict[str, Tensor]] | None = None
    load: Callable[[dict[str, Tensor]], None] | None = None
    changes: Callable[[], dict[str, Change]] | None = None
    additions: Callable[[], dict[str, Any]] | None = None
    # Weights of the base that are a function of what is trained: the part sets them, and each gradient is handed to it once
    # whole.
    through: dict[str, Callable[[Tensor], None]] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)  # e.g. {"peft": {...}}: how a format others read names it

    def attached(self) -> list[tuple[nn.Module, Piece | Around]]:
        return [*self.pieces.values(), *self.around.values()]
