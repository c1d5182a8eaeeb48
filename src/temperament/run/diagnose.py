"""Diagnoses of a finished change: a base, what became of it, and the parts that look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from temperament import parts
from temperament.bases.load import load
from temperament.errors import UserError
from temperament.protocols import Diagnosis
from temperament.run.export import delta_of
from temperament.run.tune import Subject


def diagnose(base: str, tuned: str, with_: Sequence[Any] = ("diagnose.intruder_dimensions",)) -> dict[str, Any]:
    """{"base", "tuned", "delta": {...}, "diagnoses": {name: what the part found}}. tuned: a run, adapter, delta or model."""
    looks = [parts.build(w, Diagnosis, "--with") for w in with_]
    if not looks:
        raise UserError("--with", [], "name at least one diagnosis")
    loaded = load(base)
    loaded.reset()
    delta = delta_of(tuned, loaded)
    runs = (Path(tuned),) if (Path(tuned) / "run.json").exists() else ()
    found = {type(look).part_name: look.diagnose(Subject(loaded, delta, runs)) for look in looks}
    size = {"parameters": delta.parameters, "bytes": delta.bytes, "digest": delta.digest}
    return {"base": base, "tuned": tuned, "delta": size, "diagnoses": found}
