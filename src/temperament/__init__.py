"""temperament: fine-tune foundation models, keep what they knew, and see what was gained and what was lost.

    import temperament as tp

    run = tp.tune("recipe.yaml", "runs/first")      or a dict, or a tp.Recipe
    run.ledger.verdict, run.delta, run.model
    tp.generate(run, "2+2=")

Each name is what the verb of the same name does (`temper VERB --help`); all are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from temperament import parts
    from temperament.api import (
        check,
        claim,
        compare,
        diagnose,
        dial,
        evaluate,
        export,
        generate,
        look,
        merge,
        plan,
        tune,
    )
    from temperament.bases.load import load
    from temperament.parts import part
    from temperament.run.recipe import Recipe

_WHERE = {
    **dict.fromkeys(
        ("tune", "compare", "plan", "check", "evaluate", "generate", "merge", "dial", "diagnose", "export", "claim", "look"),
        "temperament.api",
    ),
    "Recipe": "temperament.run.recipe",
    "load": "temperament.bases.load",
    "part": "temperament.parts",
}
__all__ = [
    "Recipe",
    "check",
    "claim",
    "compare",
    "diagnose",
    "dial",
    "evaluate",
    "export",
    "generate",
    "load",
    "look",
    "merge",
    "part",
    "parts",
    "plan",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "parts":
        return importlib.import_module("temperament.parts")
    if name not in _WHERE:
        raise AttributeError(f"module 'temperament' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
