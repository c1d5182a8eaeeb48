"""Models that only help: loaded once, on the device they are asked on, never trained."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from temperament.bases.load import load


@lru_cache(maxsize=8)
def frozen(spec: str, device: str, field: str) -> Any:
    """The base of this name without gradients for its weights; what it is given keeps its own."""
    base = load(spec, device=device, field=field)
    for _, p in base.parameters():
        p.requires_grad_(False)
    return base
