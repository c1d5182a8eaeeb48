"""Measure what a model can do.

    temper eval lab/lm --suite lab
    temper eval runs/first --suite test.jsonl --suite keep
    temper eval models/mine --suite '{evaluate.lab: {target: sort}}' --items 500

MODEL is a lab base, a folder, a Hugging Face id, a run or an adapter. A suite is a part of the room evaluate (`temper
parts --room evaluate`), with options if need be, or a file of test rows. A run or an adapter is measured before and
after: the ledger is shown. A run with inference parts is measured with them; before is the base alone.
"""

from __future__ import annotations

from typing import Any

from temperament.cli.app import Opt
from temperament.cli.say import Say

OPTIONS = (
    Opt("model", "lab/lm, a folder, a Hugging Face id, a run or an adapter", "MODEL"),
    Opt(
        "--suite", "what is measured: lab, keep, a part with options, or a file of test rows", "SUITE", many=True, shown="keep"
    ),
    Opt("--items", "items a skill at most", "N", int, 100),
    Opt("--batch", "rows generated together", "N", int, 64),
    Opt("--seed", "every draw follows from it", "N", int, 0),
    Opt("--device", "auto, cpu or cuda", "DEVICE", default="auto"),
    Opt("--quiet", "no progress, only the result"),
)


def run(a: Any, say: Say) -> dict[str, Any]:
    from temperament import api
    from temperament.cli.live import Live

    with Live(say) as tell:
        return api.evaluate(a.model, a.suite or (), items=a.items, batch=a.batch, seed=a.seed, device=a.device, tell=tell)


def show(data: dict[str, Any], say: Say, a: Any) -> None:
    from temperament.cli.views import interval
    from temperament.report.show import level

    if data.get("ledger"):
        from temperament.report import terminal

        say.out.print(terminal.ledger(data["ledger"], say.out.width))
        return
    rows = [
        [
            s["name"],
            level(s["value"], s["unit"]),
            interval(s["ci95"], s["unit"]),
            "–" if s["nll"] is None else f"{s['nll']:.3f}",
            f"{s['n']:,}",
            s["metric"],
        ]
        for s in data["skills"]
    ]
    say.table(["skill", "level", "95 %", "NLL", "items", "measure"], rows, right=(1, 2, 3, 4))
