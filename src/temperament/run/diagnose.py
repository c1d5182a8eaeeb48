"""Diagnoses of a finished change: a base, what became of it, and the parts that look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from temperament import parts
from temperament.bases.kept import kept
from temperament.bases.load import Base, load
from temperament.delta import Delta
from temperament.errors import UserError
from temperament.protocols import Diagnosis
from temperament.run.export import delta_of
from temperament.run.recipe import read


@dataclass(frozen=True)
class Subject:
    """What a diagnosis reads: a base and the change made on it; `runs` and `models` where several are compared."""

    base: Base
    delta: Delta | None = None
    runs: tuple[Path, ...] = ()


def diagnose(base: str, tuned: str, with_: Sequence[Any] = ("diagnose.intruder_dimensions",)) -> dict[str, Any]:
    """{"base", "tuned", "delta": {...}, "diagnoses": {name: what the part found}}. tuned: a run, adapter, delta or model."""
    looks = [parts.build(w, Diagnosis, "--with") for w in with_]
    if not looks:
        raise UserError("--with", [], "name at least one diagnosis")
    found = kept(Path(tuned).expanduser())
    trusted = found is not None and found.run is not None and read(found.run / "recipe.yaml").trust_remote_code
    loaded = load(base, own=True, trust_remote_code=trusted)
    delta = delta_of(tuned, loaded)
    runs = (Path(tuned),) if (Path(tuned) / "run.json").exists() else ()
    found = {type(look).part_name: look.diagnose(Subject(loaded, delta, runs)) for look in looks}
    size = {"parameters": delta.parameters, "bytes": delta.bytes, "digest": delta.digest}
    return {"base": base, "tuned": tuned, "delta": size, "diagnoses": found}


def weights(base: Base, delta: Delta, diagnoses: Mapping[str, Any]) -> dict[str, Any]:
    """What changed, by layer and kind of matrix: |W' - W| / |W|, with the effective rank and intruders where they were
    diagnosed."""
    import torch

    known = {r["place"]: r for d in diagnoses.values() for r in d.get("rows", ()) if "place" in r}
    parameters, places, cells = dict(base.parameters()), base.places.parameters(), []
    with torch.no_grad():
        for name, change in delta.items():
            place, which = places[name]
            if which != "weight":
                continue
            W = base.originals.get(name, parameters[name].detach()).cpu()
            row = known.get(place.name, {})
            relative = row.get("relative_norm")
            if relative is None:
                relative = float(change.norm(W.float() if change.needs_weight else None) / W.float().norm().clamp(min=1e-30))
            found = {"relative": relative, "rank": row.get("effective_rank"), "intruders": row.get("count")}
            cells.append({"layer": base.places.depth_of(name).number, "kind": place.role, "place": place.name, **found})
    return {"cells": cells}
