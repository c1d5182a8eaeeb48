"""A model as every verb takes it, and a finished run taken up again: its base, its change and its skills, without training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from temperament.bases.kept import kept
from temperament.bases.load import Base, change, load
from temperament.delta import Delta
from temperament.errors import UserError
from temperament.run import recipe as schema
from temperament.run.artefacts import Folder
from temperament.run.skills import Skills, skills_of
from temperament.run.state import place_on
from temperament.run.tune import Run


def subject(model: Any, device: str = "auto", trust_remote_code: bool = False) -> Base:
    """What a name, a folder, a Run or a loaded Base stands for, with its change applied and the inference parts of its run."""
    if isinstance(model, Run):
        base = place_on(model.base, model.state)
        base.inference = list(model.recipe.inference)
        return base
    base = load(model, device=where(device), trust_remote_code=trust_remote_code, field="model")
    if isinstance(model, (str, Path)) and (found := kept(Path(model).expanduser())) and found.run:
        base.inference = list(schema.read(found.run / "recipe.yaml").inference)
    return base


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
    if kept(folder, "run").delta is None:
        raise UserError("run", str(run), "it changed no weights")
    recipe = schema.read(folder / "recipe.yaml")
    base = load(recipe.base, device=where(device), trust_remote_code=recipe.trust_remote_code, own=True)
    return Reopened(folder, json, recipe, base, change(folder / "delta", base))
