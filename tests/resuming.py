"""Running recipes in tests: small ones on the lab base, and killed in the middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from temperament.bases.load import load
from temperament.run.tune import Run, tune

SMALL = {
    "items": 4,
    "keep": False,
    "base": False,
    "diagnose": [],
    "suites": [{"evaluate.lab": {"target": "add", "retained": ["sort"]}}],
}


class Killed(Exception):
    pass


def recipe(*steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"base": "lab/lm", "check": False, "evaluation": SMALL, "steps": list(steps), **more}


def killed_and_resumed(document: dict[str, Any], folder: Path, kills: list[int], **seed: Any) -> tuple[Run, Run]:
    """(the run in one go, the run that died as often as `kills` says). kills: steps counted over the whole run, each of the
    life it ends; checkpoints are written at every step."""
    base = load(document["base"])
    whole = tune(document, folder / "whole", base=base)
    for count in kills:
        seen = 0

        def tell(event: str, count=count, **data: Any) -> None:
            nonlocal seen
            if event == "step":
                seen += 1
                if seen == count:
                    raise Killed

        try:
            tune(document, folder / "killed", base=base, resume=(folder / "killed").exists(), tell=tell)
        except Killed:
            continue
        raise AssertionError(f"it ended before its step {count}")
    return whole, tune(document, folder / "killed", base=base, resume=True)


def same_to_the_bit(a: Run, b: Run) -> bool:
    x, y = a.json["delta"]["digest"], b.json["delta"]["digest"]
    names = [s["name"] for s in a.json["steps"]]
    return (
        x == y
        and names == [s["name"] for s in b.json["steps"]]
        and torch.equal(*(torch.cat([p.flatten() for _, p in r.base.parameters()]) for r in (a, b)))
    )
