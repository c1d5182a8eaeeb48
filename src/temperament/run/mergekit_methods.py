"""Methods of mergekit as parts of ours: which setting is which option, where it is read, and what stands in for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Meaning:
    """How a method of theirs is one of ours. each: setting a model -> option; one: setting -> option, for the whole merge;
    flags: bool -> option; numbers: number -> option. A default of None: it must be given."""

    part: str
    each: Mapping[str, tuple[str, float]]
    one: Mapping[str, tuple[str, float | None]]
    flags: Mapping[str, tuple[str, bool]]
    fixed: Mapping[str, Any]
    base: str = "apart"  # "first": base is the first of the models; "among": one of them where listed; "maybe": apart, or none
    numbers: Mapping[str, str] = field(default_factory=dict)
    own: tuple[str, ...] = ()  # of `one`: those that a model says for itself
    hand: tuple[str, ...] = ()  # flags that are read by hand

    @property
    def whole(self) -> set[str]:
        """What is read for the whole merge or slice, and not a model."""
        return {*self.one, *self.flags, *self.numbers, *self.hand} - {*self.own}

    @property
    def known(self) -> set[str]:
        return {*self.each, *self.own, *self.whole}


def arithmetic(
    part: str, each: dict[str, tuple[str, float]], normalise: bool, rescale: bool | None = None, **fixed: Any
) -> Meaning:
    flags = {"normalize": ("normalise", normalise)} | ({} if rescale is None else {"rescale": ("rescale", rescale)})
    hand = ("rescale",) if rescale is None else ()
    return Meaning(part, {"weight": ("weights", 1.0), **each}, {"lambda": ("scale", 1.0)}, flags, fixed, hand=hand)


WEIGHT = {"weight": ("weights", 1.0)}
DENSITY = {"density": ("density", 1.0)}
DELLA = DENSITY | {"epsilon": ("epsilon", 0.15)}
CRUMBS = DENSITY | {"gamma": ("gamma", 0.01)}
METHODS = {
    "linear": Meaning("merge.linear", WEIGHT, {}, {"normalize": ("normalise", True)}, {"of": "weights"}, "among"),
    "slerp": Meaning("merge.slerp", {}, {"t": ("t", None)}, {}, {}, "first"),
    # their line between parallel tensors begins where ours must, at the end of fp64
    "nuslerp": Meaning(
        "merge.slerp", WEIGHT, {}, {}, {"line_above": 1 - 1e-15}, "maybe", hand=("nuslerp_flatten", "nuslerp_row_wise")
    ),
    "nearswap": Meaning("merge.nearswap", {}, {"t": ("t", None)}, {}, {}),
    "task_arithmetic": arithmetic("merge.task_arithmetic", {}, False),
    "ties": arithmetic("merge.ties", DENSITY, True),
    "dare_ties": arithmetic("merge.dare", DENSITY, False, True, elect=True),
    "dare_linear": arithmetic("merge.dare", DENSITY, False, True),
    "della": arithmetic("merge.della", DELLA, True, True, elect=True),
    "della_linear": arithmetic("merge.della", DELLA, False, True, elect=False),
    "breadcrumbs": arithmetic("merge.breadcrumbs", CRUMBS, False),
    "breadcrumbs_ties": arithmetic("merge.breadcrumbs", CRUMBS, False, elect=True),
    "multislerp": Meaning("merge.multislerp", WEIGHT, {}, {"normalize_weights": ("normalise", True)}, {}, "maybe"),
    "karcher": Meaning("merge.karcher", {}, {}, {}, {}, "among", {"max_iter": "steps", "tol": "tolerance"}),
    "model_stock": Meaning("merge.model_stock", {}, {}, {}, {}, hand=("filter_wise",)),
    "sce": Meaning("merge.sce", {}, {"select_topk": ("density", 1.0)}, {}, {}),
    "passthrough": Meaning("merge.passthrough", {}, {"scale": ("scale", 1.0)}, {}, {}, "among", own=("scale",)),
}
QUIET = {"int8_mask", "eps"}  # they change memory or rounding there and nothing here
FLAGS = {"int8_mask"} | {f for m in METHODS.values() for f in (*m.flags, *m.hand)}
SETTINGS = QUIET | {key for m in METHODS.values() for key in m.known}
