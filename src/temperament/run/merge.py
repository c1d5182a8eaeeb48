"""Merging finished models outside of a recipe: deltas on one base, one method, a folder with a certificate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from temperament import parts
from temperament.bases.load import load
from temperament.errors import UserError
from temperament.protocols import Merge
from temperament.run.export import delta_of, export_delta


def merge(
    models: Sequence[str], out: str | Path, *, method: Any = "merge.linear", base: str | None = None, as_: str = "merged"
) -> dict[str, Any]:
    """Merge runs, adapters, deltas or tuned model folders into `out`; returns what was made and its certificate.

    base: what they were all tuned from; runs and adapters say so themselves.
    """
    if len(models) < 1:
        raise UserError("models", list(models), "name the models to merge")
    built = parts.build(method, Merge, "--method")
    named = {m: named_base(m) for m in models}
    known = {b for b in named.values() if b}
    if base is None and len(known) > 1:
        raise UserError(
            "models", sorted(known), "they were tuned from different bases; merge models of one base, or name it with --base"
        )
    if base is None and not known:
        raise UserError("--base", None, "none of the models says what it was tuned from; name the base")
    loaded = load(base or known.pop(), field="--base")
    deltas = [delta_of(m, loaded) for m in models]
    merged = built.merge(dict(loaded.parameters()), deltas)
    certificate = export_delta(loaded, merged, Path(out), as_)
    size = {"parameters": merged.parameters, "bytes": merged.bytes, "digest": merged.digest}
    return {
        "out": str(out),
        "as": as_,
        "base": loaded.id,
        "models": list(models),
        "method": parts.plain(built),
        "delta": size,
        "certificate": certificate,
    }


def named_base(model: str) -> str | None:
    """The base a run or an adapter says it was made on."""
    folder = Path(model)
    for file, keys in (("run.json", ("base", "id")), ("adapter_config.json", ("base_model_name_or_path",))):
        try:
            found: Any = json.loads((folder / file).read_text(encoding="utf-8"))
            for key in keys:
                found = found[key]
            return str(found) if found else None
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                "model", str(folder / file), "it does not say which base it belongs to; name it with --base"
            ) from None
    return None
