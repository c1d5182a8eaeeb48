"""temperament: fine-tune foundation models, keep what they knew, and see what was gained and what was lost.

    import temperament as tp

    run = tp.tune("recipe.yaml", "runs/first")      or a dict, or a tp.Recipe
    run.ledger.verdict, run.delta, run.model
    tp.generate(run, "2+2=")

Each name is what the verb of the same name does (`temper VERB --help`); all are loaded when they are first used. `tp.evaluate`
and `tp.look` are `tp.eval` and `tp.data` for those who would rather not hide a built-in or a variable.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from temperament import parts
    from temperament.api import (
        chat,
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
        sample,
        search,
        tune,
    )
    from temperament.bases.load import load
    from temperament.parts import part
    from temperament.run.doctor import doctor
    from temperament.run.extract import extract
    from temperament.run.new import write as new
    from temperament.run.recipe import Recipe

    data, eval = look, evaluate

_HERE = [
    "tune",
    "compare",
    "plan",
    "check",
    "evaluate",
    "generate",
    "chat",
    "sample",
    "merge",
    "search",
    "dial",
    "diagnose",
    "export",
    "claim",
    "look",
]
_WHERE = {name: f"temperament.api:{name}" for name in _HERE} | {
    "eval": "temperament.api:evaluate",
    "data": "temperament.api:look",
    "extract": "temperament.run.extract:extract",
    "new": "temperament.run.new:write",
    "doctor": "temperament.run.doctor:doctor",
    "Recipe": "temperament.run.recipe:Recipe",
    "load": "temperament.bases.load:load",
    "part": "temperament.parts:part",
}
__all__ = [
    "Recipe",
    "chat",
    "check",
    "claim",
    "compare",
    "data",
    "diagnose",
    "dial",
    "doctor",
    "eval",
    "evaluate",
    "export",
    "extract",
    "generate",
    "load",
    "look",
    "merge",
    "new",
    "part",
    "parts",
    "plan",
    "sample",
    "search",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "parts":
        return importlib.import_module("temperament.parts")
    if name not in _WHERE:
        raise AttributeError(f"module 'temperament' has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
