"""Carry out a recipe, and show what was gained and what was lost.

    temper tune recipe.yaml --out runs/first
    temper tune recipe.yaml --out runs/first --resume
    temper tune recipe.yaml --out runs/hot --set sft.train.optimizer.optim.adamw.lr=1e-3

In order: the recipe is validated; memory, time and disk are planned; exactness is checked on your model and data; the
base is measured (once: its scores are kept for other runs); each step is trained and measured; the ledger is drawn.
Ctrl-C and kill -9 lose nothing: --resume goes on to the same bits. Steps that have not changed are not run again.

On several processes: torchrun --nproc-per-node 2 -m temperament.cli tune recipe.yaml --out runs/first, or accelerate
launch likewise.
"""

from __future__ import annotations

from typing import Any

from temperament.cli.app import Opt
from temperament.cli.say import Say

OPTIONS = (
    Opt("recipe", "a recipe file (`temper new` writes one), or a run folder to repeat", "RECIPE"),
    Opt("--out", "folder of the run", "DIR", shown="runs/ and the recipe's address"),
    Opt("--resume", "go on with an unfinished run in that folder"),
    Opt("--fresh", "begin again, forgetting the unfinished run in that folder"),
    Opt(
        "--set",
        "change one entry of the recipe: steps.0.train.batch=32, or by the name of a step, sft.train.batch=32",
        "KEY=VALUE",
        many=True,
    ),
    Opt("--quiet", "no progress, only the result"),
)


def run(a: Any, say: Say) -> dict[str, Any]:
    from temperament import api
    from temperament.cli.live import Live

    if a.out and not (a.resume or a.fresh):
        refuse_another(a.out, a.recipe, a.set or ())
    with Live(say) as tell:
        done = api.tune(a.recipe, a.out, resume=a.resume, fresh=a.fresh, overrides=a.set or (), tell=tell)
    return done.json | {"out": str(done.folder)}


def refuse_another(out: str, recipe: str, overrides: list[str]) -> None:
    """A finished run of another recipe is not written over by a slip; whoever means it says so."""
    from pathlib import Path

    from temperament.errors import UserError
    from temperament.run.recipe import differences, read

    folder = Path(out)
    if (folder / "run.json").exists() and (differs := differences(folder / "recipe.yaml", read(recipe, overrides))):
        where = ", ".join(differs[:3]) + (" and more" if len(differs) > 3 else "")
        mend = f"it holds a run of another recipe (other {where}); add --resume to do only what changed, --fresh to begin again"
        raise UserError("--out", out, f"{mend}, or name another folder")


def show(data: dict[str, Any], say: Say, a: Any) -> None:
    from temperament.cli.views import run_result

    run_result(data, say)
