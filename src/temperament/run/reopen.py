"""A model as every verb takes it, and a finished run taken up again: its base, its change and its skills, without training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from temperament.bases.load import Base, load
from temperament.delta import Delta
from temperament.errors import UserError
from temperament.run import recipe as schema
from temperament.run.artefacts import Folder
from temperament.run.export import read_folder
from temperament.run.state import place_on
from temperament.run.skills import Skills, skills_of
from temperament.run.tune import Run


def subject(model: Any, device: str = "auto", trust_remote_code: bool = False) -> Base:
    """What a name, a folder, a Run or a loaded Base stands for, with its change applied."""
    if isinstance(model, Run):
        return place_on(model.base, model.state)
    return load(model, device=where(device), trust_remote_code=trust_remote_code, field="model")


def where(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return str(torch.device(device))
    except RuntimeError:
        raise UserError("--device", device, "give auto, cpu or cuda") from None


@dataclass
class Reopened:
    """folder: of the run. delta: its change, bound to `base`; the base's modules are pure."""

    folder: Path
    json: dict[str, Any]
    recipe: schema.Recipe
    base: Base
    delta: Delta

    def skills(self) -> Skills:
        return skills_of(self.recipe, self.base)


def reopen(run: str | Path, device: str = "auto") -> Reopened:
    """A finished run. Raises UserError where the folder is none, is unfinished, or changed no weights."""
    folder = Path(run)
    if not (folder / "run.json").exists():
        raise UserError("run", str(run), "no run is in this folder; name the --out of a `temper tune`")
    json = Folder(folder).run()
    if json.get("status") != "done":
        raise UserError(
            "run",
            str(run),
            f"it is {json.get('status', 'unfinished')}; finish it with "
            f"`temper tune {folder / 'recipe.yaml'} --out {folder} --resume`",
        )
    if not (folder / "delta").is_dir():
        raise UserError("run", str(run), "it changed no weights")
    recipe = schema.read(folder / "recipe.yaml")
    base = load(recipe.base, device=where(device), trust_remote_code=recipe.trust_remote_code)
    return Reopened(folder, json, recipe, base, read_folder(folder / "delta").check_base(base.sha256))
