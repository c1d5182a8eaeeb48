"""Depth of a tensor from names alone, for checkpoints that are not loaded: 0 at the first block of its stack, 1 at the last."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

_NUMBER = re.compile(r"(?:^|[./])(\d+)(?=\.)")
_FIRST = re.compile(r"embed|wte|wpe|patch|position|cls_token|class_token|stem\.|conv1\.|pre_layernorm|time_|condition")


def block_of(name: str) -> tuple[str, int] | None:
    """("lm/model.layers", 3) for lm/model.layers.3.mlp.up_proj.weight; None outside of blocks."""
    found = _NUMBER.search(name)
    return (name[: found.start()], int(found.group(1))) if found else None


def depths(names: Iterable[str]) -> Callable[[str], float]:
    """name -> depth among these names. Outside of blocks embeddings, patches and positions come first, all else last."""
    last: dict[str, int] = {}
    for name in names:
        if (at := block_of(name)) is not None:
            last[at[0]] = max(last.get(at[0], 0), at[1])

    def depth(name: str) -> float:
        at = block_of(name)
        if at is not None and at[0] in last:
            return at[1] / max(last[at[0]], 1)
        return 0.0 if _FIRST.search(name) else 1.0

    return depth
