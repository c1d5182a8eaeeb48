"""[122] Balancing the budget: few rows are best spent on demonstrations; of many, a mix with preferences beats either alone.

Task: letters backwards, in brackets - a form the small lab base has never seen, a procedure it knows. Half of those who write demonstrations are
careless and copy the letters as they stand (in brackets too); those who judge prefer the right answer to the careless one. One row costs
the same, demonstration or pair. Budgets of 32 and 320 rows, three passes; all on demonstrations, a tenth on them and the rest on
pairs, all on pairs, each at its own best rate. Compared at 320: the mix against the better of the two pure ways; at 32, demonstrations alone
against the best of the others, must not be worse.
"""

import json

from temperament.methods.studies.budget import Budget, stages, variant
from temperament.nn import draws
from temperament.run.claims import Claim
from temperament.run.recipe import read

SMALL, LARGE = 32, 320
RATES = {0.0: [3e-4, 1e-3, 3e-3], 0.9: [3e-5, 1e-4, 3e-4], 1.0: [3e-5, 1e-4, 3e-4]}  # of what the share's name says: of SFT, of DPO
TAUGHT = 1e-3  # SFT's, where a share is spent on both
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def files(folder, seed: int) -> dict[str, str]:
    """Demonstrations, pairs and test rows of this seed."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, kinds = draws.generator(seed, "claim/122"), {"sft": LARGE, "dpo": LARGE, "test": 100}
    pick = lambda n: __import__("torch").randint(n, (1,), generator=rng).item()
    out = {}
    for kind, n in kinds.items():
        rows = []
        for _ in range(n):
            letters = [LETTERS[pick(26)] for _ in range(4 + pick(4))]
            prompt, right, careless = f"turn: {' '.join(letters)} =", f" [ {' '.join(letters[::-1])} ]", f" [ {' '.join(letters)} ]"
            said = careless if kind == "sft" and pick(2) else right
            rows.append({"prompt": prompt, "chosen": right, "rejected": careless} if kind == "dpo" else {"prompt": prompt, "completion": said})
        out[kind] = str(folder / f"{kind}-{seed}.jsonl")
        (folder / f"{kind}-{seed}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return out


def recipe(at: dict[str, str], budget: int, share: float, rate: float) -> dict:
    lr = {"sft": rate if share == 0 else TAUGHT, "dpo": rate}
    source = lambda kind: {"data.file": {"path": at[kind], "holdout": 0}}
    train = lambda kind: {"source": source(kind), "optimizer": {"optim.adamw": {"lr": lr[kind]}}, "batch": 16, "epochs": 3}
    dpo = {**train("dpo"), "objective": {"objectives.preference.dpo": {"beta": 0.1}}}
    target = {"evaluate.file": {"data": {"data.file": {"path": at["test"], "holdout": 0}}, "rows": "all", "name": "turn"}}
    suites = [target, {"evaluate.lab": {"retained": ["reverse", "copy", "sort"]}}]
    whole = {"base": "lab/lm-small", "check": False, "evaluation": {"items": 100, "keep": False, "diagnose": [], "suites": suites},
             "steps": [{"name": "sft", "train": train("sft"), "ledger": False}, {"name": "dpo", "train": dpo}]}  # fmt: skip
    built, study = read(whole), Budget([budget], [share])
    return variant(built, study.split(budget, share), *stages(built), seed=0)


def run(seed, lab):
    at, found = files(lab.folder / "rows", seed), {}
    tuning = files(lab.folder / "rows", 100)
    for budget in (SMALL, LARGE):
        for share, rates in RATES.items():
            tuned = lambda rate, rows, b=budget, s=share: recipe(rows, b, s, rate)
            best = max(rates, key=lambda r: lab.tune(f"{budget}-{share:g}-rate-{r:g}", tuned(r, tuning).plain(), 100)["target"])
            found[budget, share] = lab.tune(f"{budget}-{share:g}", tuned(best, at).plain(), seed) | {"rate": best}
    level = lambda b, s: found[b, s]["target"]
    numbers = {f"{b}_{s:g}": level(b, s) for b in (SMALL, LARGE) for s in RATES}
    baseline = {"target": max(level(LARGE, 0.0), level(LARGE, 1.0)), "small": max(level(SMALL, 0.9), level(SMALL, 1.0))}
    return {"method": {"target": level(LARGE, 0.9), "small": level(SMALL, 0.0), **numbers}, "baseline": baseline}


claim = Claim(
    paper="122",
    title="Balancing the Budget: Trade-offs Between Supervised and Preference-Based Finetuning",
    says="Small budgets are best spent on demonstrations; of a larger one a tenth on them and the rest on preferences beats either alone.",
    parts=("studies.budget", "objectives.sft.cross_entropy", "objectives.preference.dpo"),
    measure="target",
    better="higher",
    baseline="the whole budget on demonstrations, or the whole on preferences, whichever is better, each at its own best rate",
    within=(("small", 0.0),),
    seeds=(0, 1, 2),
    note="Demonstrations are of mixed quality (half careless); with demonstrations that are all right a mix gains nothing here",
    run=run,
)
