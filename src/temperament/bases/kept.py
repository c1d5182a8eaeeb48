"""What a folder stands for beside a model: a change, kept with the name of the base it was made on.

    runs/first                a finished run, as it ended
    runs/first/steps/sft      one of its steps, as it left the model
    adapters/mine             a PEFT adapter, or a LoRA of diffusers, that names its base
    deltas/mine               a delta of ours that names its base

A run may also end with no change at all: with an inference system on its base.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from temperament.delta.diffusers_format import is_diffusers_lora
from temperament.delta.files import read_json
from temperament.errors import UserError

NAMELESS = "it does not say which base it was made on; name the base"


@dataclass(frozen=True)
class Kept:
    """base: what it was made on, None where it does not say. delta: folder of the change, None where there is none.
    run: the run it is of."""

    base: str | None
    delta: Path | None
    run: Path | None = None

    def named(self, field: str, spec: str) -> str:
        if self.base is None:
            raise UserError(field, spec, NAMELESS)
        return self.base


def kept(folder: Path, field: str = "model") -> Kept | None:
    """What is kept in a folder, or None where it is something else (a model). UserError where it is not finished or damaged."""
    if folder.name == "delta" and ((folder.parent / "run.json").is_file() or (folder.parent / "artefact.json").is_file()):
        folder = folder.parent
    if (folder / "run.json").is_file():
        return _run(folder, field)
    if (folder / "artefact.json").is_file() and (run := folder.parent.parent / "run.json").is_file():
        if not (folder / "delta").is_dir():
            raise UserError(field, str(folder), "this step left no change of the model; name another step, or the run")
        return Kept(_base(read_json(run, field), run, field), folder / "delta", run.parent)
    if (folder / "adapter_config.json").is_file():
        return Kept(read_json(folder / "adapter_config.json", field).get("base_model_name_or_path") or None, folder)
    if is_diffusers_lora(folder) and not (folder / "delta.json").is_file():
        return Kept(None, folder)
    if (folder / "delta.json").is_file():
        meta = read_json(folder / "delta.json", field).get("meta")
        meta = meta if isinstance(meta, dict) else {}
        made = meta.get("extracted")
        return Kept(meta.get("on") or (made.get("base") if isinstance(made, dict) else None), folder)
    return None


def _run(folder: Path, field: str) -> Kept:
    run = read_json(folder / "run.json", field)
    if run.get("kind") == "study":
        first = next(iter(run["runs"].values()))["folder"] if run.get("runs") else "runs/..."
        raise UserError(field, str(folder), f"it holds several runs; name one of them, such as {folder / first}")
    if run.get("status") != "done":
        again = f"`temper tune {folder / 'recipe.yaml'} --out {folder} --resume`"
        raise UserError(field, str(folder), f"this run is {run.get('status', 'unfinished')}; finish it with {again}")
    delta = folder / "delta"
    if "delta" in run and not delta.is_dir():
        raise UserError(field, str(delta), "the change of this run is missing; copy it again, or tune again with --fresh")
    # (a folder may still hold the change of a recipe that was carried out in it before)
    return Kept(_base(run, folder / "run.json", field), delta if "delta" in run else None, folder)


def _base(run: dict[str, Any], file: Path, field: str) -> str:
    base = run.get("base")
    if not isinstance(base, dict) or not isinstance(base.get("id"), str):
        raise UserError(field, str(file), NAMELESS)
    return base["id"]
