"""Merge several tuned models into one.

    temper merge runs/a runs/b --out models/ab
    temper merge runs/a runs/b --method '{merge.linear: {weights: [0.3, 0.7]}}' --out models/ab
    temper merge models/a models/b --base Qwen/Qwen2.5-0.5B --method merge.linear --out models/ab --as delta
    temper merge mergekit.yml --out models/ab            (a mergekit configuration as it is)
    temper merge merge.yaml --out runs/merged            (a recipe)

Models are runs, adapters, deltas, or folders tuned from one base. The result is reloaded in a fresh process and compared
before it is called done. A recipe whose steps merge is carried out as `temper tune` does, with its ledger.
"""

from __future__ import annotations

from typing import Any

from temperament.cli.app import Opt
from temperament.cli.say import Say

OPTIONS = (
    Opt("models", "runs, adapters, deltas or model folders; or one recipe file", "MODEL", many=True),
    Opt("--out", "new folder for the result", "DIR"),
    Opt("--method", "how: a part of the room merge, with options if need be", "PART", default="merge.linear"),
    Opt("--base", "what they were tuned from", "BASE", shown="what the runs and adapters say"),
    Opt("--as", "merged (a model), adapter or delta", "FORM", default="merged", choices=("merged", "adapter", "delta")),
    Opt("--quiet", "no progress, only the result"),
)


def run(a: Any, say: Say) -> dict[str, Any]:
    from temperament import api
    from temperament.cli.app import need
    from temperament.cli.live import Live
    from temperament.run.mergekit_yaml import is_mergekit
    from temperament.run.recipe import parse_yaml

    need("merge", a, "out")
    if len(a.models) == 1 and a.models[0].endswith((".yaml", ".yml")):
        if is_mergekit(a.models[0]):
            return api.merge(a.models[0], a.out)
        with Live(say) as tell:
            done = api.tune(a.models[0], a.out, tell=tell)
        return done.json | {"out": str(done.folder)}
    method = parse_yaml(a.method, "--method") if a.method.lstrip().startswith("{") else a.method
    return api.merge(a.models, a.out, method=method, base=a.base, as_=a.as_)


def show(data: dict[str, Any], say: Say, a: Any) -> None:
    from temperament.cli.views import certified, run_result

    if "status" in data:
        run_result(data, say)
    else:
        certified(data["certificate"], data["out"], say)
