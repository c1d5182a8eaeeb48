"""`temper merge --search`: the coefficients of a merge chosen on development items, gain against loss, resumable.

    search(["runs/a", "runs/b"], "models/ab", suites=[{"evaluate.lab": {"target": "shift"}}],
           method={"merge.ties": {"density": {"search": [0.05, 0.9]}, "weights": [{"search": [0, 1]}, {"search": [0, 1]}]}})

Any number of the method may be `{search: [low, high]}` or `{search: {choices: [...]}}`. A trial is worth its gain on the
targets less ten times what its retained skills lose beyond the budget; the best one is merged, written and certified.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from temperament import parts
from temperament.bases.load import load
from temperament.errors import UserError
from temperament.nn import draws
from temperament.protocols import Merge
from temperament.run import recipe as schema
from temperament.run.artefacts import address
from temperament.run.evaluate import suite
from temperament.run.export import delta_of, free
from temperament.run.merge_inputs import named_base
from temperament.run.merging import merge
from temperament.run.scoring import Scorer

OVER = 10.0  # what a point lost beyond the budget costs, in points of gain


def search(
    models: Sequence[str],
    out: str | Path,
    *,
    method: Any,
    suites: Sequence[Any],
    base: str | None = None,
    trials: int = 30,
    budget: float = 0.5,
    items: int = 60,
    seed: int = 0,
    as_: str = "merged",
    tell: Callable[..., None] = lambda event, **data: None,
) -> dict[str, Any]:
    """The merge's own record, with "search": {"trials", "best", "front"}. Trials are kept beside `out` (NAME.search.jsonl, a
    journal of optuna), so a search that was stopped goes on where it was. What trial n tries follows from (seed, n) and the
    trials before it alone: stopped or not, a search is the same."""
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise UserError("--search", "optuna", "it is not installed; pip install 'temperament[search]'") from None
    if trials < 1:
        raise UserError("--search", trials, "say how many trials, 1 or more")
    if not _ranges(method):
        raise UserError("--method", method, "nothing to search: write {search: [low, high]} where a number is to be found")
    free(out, "--out")
    base = base or next((b for m in models if (b := named_base(m))), None)
    if base is None:
        raise UserError("--base", None, "none of the models says what it was tuned from; name the base")
    loaded = load(base, field="--base", own=True)
    deltas = [delta_of(m, loaded) for m in models]
    parts.build(
        _filled(method, lambda name, spec: _middle(spec)), Merge, "--method"
    )  # wrong options are told before the first trial
    recipe = schema.Recipe(
        base=loaded.id, seed=seed, evaluation=schema.Evaluation(suites=[suite(s) for s in suites], items=items)
    )
    score = Scorer(recipe, loaded, items)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    journal = Path(out).with_name(Path(out).name + ".search.jsonl")
    journal.parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=address([method, parts.plain(recipe), budget, loaded.sha256, loaded.reading, [d.digest for d in deltas]]),
        storage=JournalStorage(JournalFileBackend(str(journal))),
        direction="maximize", load_if_exists=True)  # fmt: skip
    finished = lambda: [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]

    def objective(trial: Any) -> float:
        spec = _filled(method, lambda name, given: _suggested(trial, name, given))
        found = score.summary(parts.build(spec, Merge, "--method").merge(loaded, deltas))
        for key, value in {**found, "method": json.dumps(spec)}.items():
            trial.set_user_attr(key, value)
        lost = max(0.0, -found["retained_change"] - budget)
        tell("search", trial=len(finished()), of=trials, method=spec, **found)
        return found["target_change"] - OVER * lost

    while (done := len(finished())) < trials:
        study.sampler = optuna.samplers.TPESampler(seed=draws.key(seed, "search", done) % 2**32)
        study.optimize(objective, n_trials=1)
    rows = [{"worth": t.value, **{k: (json.loads(v) if k == "method" else v) for k, v in t.user_attrs.items()}}
            for t in finished()]  # fmt: skip
    best = max(rows, key=lambda r: r["worth"])
    made = merge(models, out, method=best["method"], base=base, as_=as_)
    return made | {"search": {"trials": rows, "best": best, "front": front(rows), "budget": budget, "items": items}}


def front(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Trials no other beats in both gain and loss, by what they retain."""
    kept: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda r: (-r["retained_change"], -r["target_change"])):
        if not kept or row["target_change"] > kept[-1]["target_change"]:
            kept.append(row)
    return kept


def _is_range(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"search"}


def _ranges(value: Any) -> bool:
    if _is_range(value):
        return True
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return any(_ranges(v) for v in inner)


def _filled(value: Any, choose: Callable[[str, Any], Any], at: str = "") -> Any:
    if _is_range(value):
        return choose(at, value["search"])
    if isinstance(value, Mapping):
        return {k: _filled(v, choose, f"{at}.{k}".lstrip(".")) for k, v in value.items()}
    return [_filled(v, choose, f"{at}[{i}]") for i, v in enumerate(value)] if isinstance(value, list) else value


def _bounds(spec: Any) -> tuple[float, float]:
    if not (isinstance(spec, list) and len(spec) == 2 and all(isinstance(v, (int, float)) for v in spec) and spec[0] < spec[1]):
        raise UserError("search", spec, "give [low, high], or {choices: [...]}")
    return float(spec[0]), float(spec[1])


def _middle(spec: Any) -> Any:
    return spec["choices"][0] if isinstance(spec, Mapping) and spec.get("choices") else sum(_bounds(spec)) / 2


def _suggested(trial: Any, name: str, spec: Any) -> Any:
    if isinstance(spec, Mapping) and spec.get("choices"):
        return trial.suggest_categorical(name, spec["choices"])
    return trial.suggest_float(name, *_bounds(spec))
