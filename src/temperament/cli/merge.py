"""Merge several tuned models into one.

    temper merge runs/a runs/b --out models/ab
    temper merge runs/a runs/b --method '{merge.linear: {weights: [0.3, 0.7]}}' --out models/ab
    temper merge models/a models/b --base Qwen/Qwen2.5-0.5B --method merge.linear --out models/ab --as delta
    temper merge runs/a runs/b --method merge.ties --suite '{evaluate.lab: {target: shift}}' --out models/ab
    temper merge mergekit.yml --out models/ab            (a mergekit configuration as it is; --as and --suite beside it)
    temper merge merge.yaml --out runs/merged            (a recipe)
    temper merge runs/a runs/b --method '{merge.ties: {density: {search: [0.05, 0.9]}}}' \\
        --search 30 --suite '{evaluate.lab: {target: shift}}' --budget 0.5 --out models/ab

Models are runs, adapters, deltas, or folders tuned from one base. The result is reloaded in a fresh process and compared
before it is called done. A recipe whose steps merge is carried out as `temper tune` does, with its ledger.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from temperament.cli.app import Opt
from temperament.cli.say import Say
from temperament.errors import UserError

OPTIONS = (
    Opt("models", "runs, adapters, deltas or model folders; or one recipe file", "MODEL", many=True),
    Opt("--out", "new folder for the result", "DIR"),
    Opt("--method", "how: a part of the room merge, with options if need be", "PART", shown="merge.linear"),
    Opt("--base", "what they were tuned from", "BASE", shown="what the runs and adapters say"),
    Opt("--as", "merged (a model), adapter or delta", "FORM", shown="merged", choices=("merged", "adapter", "delta")),
    Opt("--search", "find the numbers written {search: [low, high]} in --method, by so many trials", "N", int),
    Opt("--suite", "skills to measure: what survived of each model, and what --search weighs", "SUITE", many=True),
    Opt("--budget", "what the retained skills may lose, percentage points", "POINTS", float, shown="0.5"),
    Opt("--items", "items a skill in a trial", "N", int, shown="60"),
    Opt("--quiet", "no progress, only the result"),
)


def run(a: Any, say: Say) -> dict[str, Any]:
    from temperament import api
    from temperament.cli.app import need
    from temperament.cli.live import Live
    from temperament.run.evaluate import suite
    from temperament.run.mergekit_yaml import is_mergekit
    from temperament.run.recipe import parse_yaml

    need("merge", a, "out")
    for given in a.suite or []:
        suite(given)  # wrong ones are told before anything is written
    if len(a.models) == 1 and a.models[0].endswith((".yaml", ".yml")):
        return _mergekit(a, say) if is_mergekit(a.models[0]) else _recipe(a, say)
    method, as_ = a.method or "merge.linear", a.as_ or "merged"
    method = parse_yaml(method, "--method") if method.lstrip().startswith("{") else method
    if a.search:
        how = {"trials": a.search, "budget": 0.5 if a.budget is None else a.budget, "items": a.items or 60, "as_": as_}
        with Live(say) as tell:
            return api.search(a.models, a.out, method=method, suites=a.suite or [], base=a.base, tell=tell, **how)
    return _measured(api.merge(a.models, a.out, method=method, base=a.base, as_=as_), a.models, a, say)


def _mergekit(a: Any, say: Say) -> dict[str, Any]:
    from temperament import api
    from temperament.run.evaluate import suite
    from temperament.run.mergekit_multi import several
    from temperament.run.mergekit_yaml import beside, named_models, notes, read_all

    _alone(a, "a mergekit file says it itself; write it there", "method", "base")
    _alone(a, "it looks for numbers of --method; name the models and --method, not a file", "search", "budget")
    if not a.suite:
        _alone(a, "it goes with --suite", "items")
    documents, as_ = read_all(a.models[0]), a.as_ or "merged"
    beside(documents[-1], as_)
    for given in a.suite or []:  # what cannot be measured is told before the merge
        suite(given)
        if pair := next((m for m in named_models(documents[-1]) if "+" in m and not Path(m).exists()), None):
            raise UserError("--suite", pair, "model+adapter cannot be measured by itself; merge without --suite")
    for line in dict.fromkeys(note for document in documents for note in notes(document)):
        say.note(line)
    one = len(documents) == 1
    done = api.merge(documents[0], a.out, as_=as_) if one else several(documents, a.out, api.merge, as_=as_)
    return _measured(done, [m for m in done["models"] if m != done["base"]], a, say)


def _recipe(a: Any, say: Say) -> dict[str, Any]:
    from temperament import api
    from temperament.cli.live import Live

    _alone(a, "a recipe says it itself; write it there", "method", "base", "as_", "search", "suite", "budget", "items")
    with Live(say) as tell:
        done = api.tune(a.models[0], a.out, tell=tell)
    return done.json | {"out": str(done.folder)}


def _alone(a: Any, mend: str, *dests: str) -> None:
    """Refuse options that cannot be meant beside a file."""
    for option in OPTIONS:
        if option.dest in dests and (value := getattr(a, option.dest)) is not None:
            raise UserError(option.name, value, mend)


def _measured(done: dict[str, Any], models: list[str], a: Any, say: Say) -> dict[str, Any]:
    if not a.suite:
        return done
    from temperament.cli.live import Live
    from temperament.run.merge_ledger import ledger

    with Live(say) as tell:
        return done | ledger(models, a.out, suites=a.suite, base=done["base"], items=a.items or 60, tell=tell)


def show(data: dict[str, Any], say: Say, a: Any) -> None:
    from temperament.cli.views import certified, place, run_result

    if "status" in data:
        run_result(data, say)
    else:
        if "search" in data:
            best = data["search"]["best"]
            found = f"target {best['target_change']:+.1f}, retained {best['retained_change']:+.1f} points"
            say.out.print(f"best of {len(data['search']['trials'])}: {best['method']}: {found}")
            place("picture", data["search"]["picture"], say)
        certified(data["certificate"], data["out"], say)
        if "synergy" in data:
            say.out.print()
            survived(data, say)


def survived(data: dict[str, Any], say: Say) -> None:
    """A line a skill: every model, the merge, and what the merge has over their mean."""
    from temperament.report import show

    found = data["ledger"]["matrix"]
    rows = []
    for k, (skill, unit) in enumerate(zip(found["skills"], found["units"], strict=True)):
        more = data["synergy"].get(skill)
        over = show.signed(more["synergy"], unit) if more else ""
        rows.append([skill, *(show.level(values[k], unit) for values in found["values"]), over])
    say.table(["skill", *found["rows"], "synergy"], rows, right=tuple(range(1, len(found["rows"]) + 2)))
