"""Several merges in one file, parted by lines of ---: each has a name, and later ones may take what earlier ones made.

The last is written to `out`, those before it to `out`.parts/NAME; all are certified, and if one fails none is left.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from temperament.errors import UserError
from temperament.run.mergekit_check import checked

MODELS = ("model", "base_model", "path", "source", "tokenizer_source")  # keys under which a model is named


def several(documents: Sequence[Mapping[str, Any]], out: str | Path, merge: Callable, **how: Any) -> dict[str, Any]:
    """What `merge` says of the last. how: its options, for the last."""
    folder = Path(out).with_name(Path(out).name + ".parts")
    places: dict[str, str] = {}
    for i, document in enumerate(documents):
        checked(document)
        name, last = document.get("name"), i == len(documents) - 1
        if last and name is None:
            continue
        if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.-]*", name) or name in places:
            raise UserError(f"name of merge {i + 1}", name, "each of several merges in a file has one, a word of its own")
        places[name] = str(out) if last else str(folder / name)
    for place in (folder, Path(out)):
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError("--out", str(place), "it exists already; choose another folder or remove it")
    made: dict[str, str] = {}
    try:
        for document in documents[:-1]:
            name = document["name"]
            merge(named(document, made), places[name])
            made[name] = places[name]
        return merge(named(documents[-1], made), out, **how) | {"parts": made}
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def named(value: Any, made: Mapping[str, str], key: Any = None) -> Any:
    """A document in which the names of earlier merges are their folders."""
    if isinstance(value, Mapping):
        return {k: named(v, made, k) for k, v in value.items()}
    if isinstance(value, list):
        return [named(v, made, "model" if key == "models" else key) for v in value]
    if isinstance(value, str) and key in MODELS:
        model, plus, adapter = value.partition("+")
        return made.get(model, model) + plus + adapter
    return value
