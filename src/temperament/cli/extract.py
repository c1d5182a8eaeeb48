"""Make a small adapter or delta from any two checkpoints, to a stated rank, share or error.

    temper extract models/tuned --base Qwen/Qwen2.5-0.5B --rank 16 --out adapters/tuned
    temper extract models/tuned --base models/base --kind sparse --error 0.1 --out deltas/tuned
    temper extract runs/first --base lab/lm --kind ternary --out deltas/first

low_rank: a LoRA that PEFT loads. sparse: the largest entries. ternary: signs and one number a tensor, a fraction of a bit
an entry. The error is relative: how far the kept change is from the whole one.
"""

from __future__ import annotations

from typing import Any

from temperament.cli.app import Opt
from temperament.cli.say import Say
from temperament.errors import UserError

OPTIONS = (
    Opt("tuned", "a tuned model folder, run or adapter", "MODEL"),
    Opt("--base", "what it was tuned from", "BASE"),
    Opt("--out", "new folder for the result", "DIR"),
    Opt("--kind", "low_rank, sparse or ternary", "KIND", default="low_rank", choices=("low_rank", "sparse", "ternary")),
    Opt("--rank", "of low_rank", "N", int),
    Opt("--density", "share of each tensor's entries, for sparse and ternary", "SHARE", float),
    Opt("--error", "instead: the largest relative error of a tensor", "E", float),
)


def run(a: Any, say: Say) -> dict[str, Any]:
    from temperament.cli.app import need
    from temperament.run.extract import extract

    need("extract", a, "base", "out")
    if a.rank is not None and a.kind != "low_rank":
        raise UserError("--rank", a.rank, f"{a.kind} has none; give --density or --error, or --kind low_rank")
    if a.density is not None and a.kind == "low_rank":
        raise UserError("--density", a.density, "low_rank takes --rank or --error; or use --kind sparse or ternary")
    return extract(a.base, a.tuned, a.out, kind=a.kind, rank=a.rank, density=a.density, error=a.error)


def show(data: dict[str, Any], say: Say, a: Any) -> None:
    from temperament.cli.views import certified, place

    if data["certificate"]["by"]:
        certified(data["certificate"], data["out"], say)
    else:
        place("written", data["out"], say)
    size, error = data["bytes"] / 1e6, 100 * data["error"]
    say.out.print(f"size      {size:.2f} MB, {data['times_smaller']:.0f} times smaller than the change in fp32")
    say.out.print(f"error     {error:.1f} % of the change is left out ({len(data['tensors'])} tensors)")
