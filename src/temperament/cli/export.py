"""Write a finished run as a model, an adapter or a delta that others load.

    temper export runs/first --to models/first
    temper export runs/first --to adapters/first --as adapter
    temper export runs/first --to models/gentle --at best

merged: a folder for from_pretrained, with tokenizer and template. adapter: PEFT layout, where the change is low-rank.
delta: any change, exactly. The files are reloaded in a fresh process and compared with the live model; the certificate
lies with them.
"""

from __future__ import annotations

from typing import Any

from temperament.cli.app import Opt
from temperament.cli.say import Say

OPTIONS = (
    Opt("run", "a finished run", "RUN"),
    Opt("--to", "new folder", "DIR"),
    Opt("--as", "merged, adapter or delta", "FORM", default="merged", choices=("merged", "adapter", "delta")),
    Opt("--dtype", "of a merged model: fp32, bf16 or fp16", "DTYPE", shown="what the base is stored in"),
    Opt("--at", "strength of the change, or best: the run's best point of the dial", "STRENGTH", shown="1"),
)


def run(a: Any, say: Say) -> dict[str, Any]:
    from temperament import api
    from temperament.cli.app import need
    from temperament.errors import UserError

    need("export", a, "to")
    at = a.at
    if at not in (None, "best"):
        try:
            at = float(at)
        except ValueError:
            raise UserError("--at", a.at, "give a number, or best") from None
    return api.export(a.run, a.to, a.as_, at=at, dtype=a.dtype)


def show(data: dict[str, Any], say: Say, a: Any) -> None:
    from temperament.cli.views import certified

    certified(data["certificate"], data["to"], say)
    if (data["at"] or {}).get("strength") == 0:
        say.note("at strength 0 this is the base itself: nothing of the change is in it")
