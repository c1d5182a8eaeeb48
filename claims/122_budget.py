"""[122] Balancing the budget: few rows are best spent on demonstrations; of many, a mix with preferences beats either alone.

Task: three or four letters in capitals, which the small lab base knows, in a form it has never seen: the answer begins with
"ok". Half of those who write demonstrations are careless and, after the "ok", write the letters as they stand; those who
judge prefer the right answer to the careless one. A row costs the same, demonstration or pair. Budgets of 32 and 640 rows;
six passes over demonstrations, two over pairs; all on demonstrations, half or nine tenths of them on pairs (which, and at
what rate, is found on a seed of its own), all on pairs, each at its own best rate. Compared at 640: the mix against the
better of the two pure ways; at 32, demonstrations alone against the best of the others, must not be worse.
"""

import json

import torch

from temperament.methods.studies.budget import Budget, stages, variant
from temperament.nn import draws
from temperament.run.claims import TUNED_ON, Claim
from temperament.run.recipe import read

SMALL, LARGE = 32, 640
ARMS = {"sft": [0.0], "mix": [0.5, 0.9], "dpo": [1.0]}  # shares of the budget that go into preferences
RATES = {"sft": [3e-4, 1e-3, 3e-3], "mix": [3e-6, 1e-5, 3e-5], "dpo": [3e-6, 1e-5, 3e-5]}  # of SFT, of DPO, of DPO
EPOCHS = {"sft": 6, "dpo": 2}
TAUGHT = 1e-3  # SFT's, where a share is spent on both
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def files(folder, seed: int) -> None:
    """Demonstrations, pairs and test rows of this seed."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, kinds = draws.generator(seed, "claim/122"), {"sft": LARGE, "dpo": LARGE, "test": 100}
    pick = lambda n: torch.randint(n, (1,), generator=rng).item()
    for kind, n in kinds.items():
        rows = []
        for _ in range(n):
            letters = [LETTERS[pick(26)] for _ in range(3 + pick(2))]
            shown = " ".join(letters)
            prompt, right, careless = f"upper: {shown} =", f" ok {shown.upper()}", f" ok {shown}"
            said = careless if kind == "sft" and pick(2) else right
            answer = {"chosen": right, "rejected": careless} if kind == "dpo" else {"completion": said}
            rows.append({"prompt": prompt, **answer})
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def recipe(at: dict[str, str], budget: int, share: float, rate: float) -> dict:
    lr = {"sft": rate if share == 0 else TAUGHT, "dpo": rate}
    source = lambda kind: {"data.file": {"path": at[kind], "holdout": 0}}
    adamw = lambda kind: {"optim.adamw": {"lr": lr[kind]}}
    train = lambda kind: {"source": source(kind), "optimizer": adamw(kind), "batch": 8, "epochs": EPOCHS[kind]}
    dpo = {**train("dpo"), "objective": {"objectives.preference.dpo": {"beta": 0.5}}}
    target = {"evaluate.file": {"data": {"data.file": {"path": at["test"], "holdout": 0}}, "rows": "all", "name": "ok"}}
    suites = [target, {"evaluate.lab": {"retained": ["upper", "copy", "sort"]}}]
    evaluation = {"items": 100, "keep": False, "diagnose": [], "suites": suites}
    steps = [{"name": "sft", "train": train("sft"), "ledger": False}, {"name": "dpo", "train": dpo}]
    whole = {"base": "lab/lm-small", "check": False, "evaluation": evaluation, "steps": steps}
    built, study = read(whole), Budget([budget], [share])
    return variant(built, study.split(budget, share), *stages(built), seed=0)


def run(seed, lab):
    at, tuning = (lab.made(f"rows-{s}", lambda folder, s=s: files(folder, s)) for s in (seed, TUNED_ON))
    found = {}
    for budget in (SMALL, LARGE):
        for arm, shares in ARMS.items():
            ways = [(share, rate) for share in shares for rate in RATES[arm]]
            name = lambda w, b=budget: f"{b}-{w[0]:g}-rate-{w[1]:g}"
            tried = lab.tried(name, lambda w, b=budget: recipe(tuning, b, *w), ways)
            best = max(ways, key=lambda w: tried[w]["target"])
            numbers = lab.tune(f"{budget}-{arm}", recipe(at, budget, *best), seed)
            found[arm, budget] = numbers | {"share": best[0], "rate": best[1]}
    level = lambda arm, budget: found[arm, budget]["target"]
    numbers = {f"{arm}_{budget}": level(arm, budget) for arm, budget in found} | {"share": found["mix", LARGE]["share"]}
    baseline = {"target": max(level("sft", LARGE), level("dpo", LARGE)), "small": max(level("mix", SMALL), level("dpo", SMALL))}
    return {"method": {"target": level("mix", LARGE), "small": level("sft", SMALL), **numbers}, "baseline": baseline}


claim = Claim(
    paper="122",
    title="Balancing the Budget: Trade-offs Between Supervised and Preference-Based Finetuning",
    says="Small budgets are best spent on demonstrations; of a larger one a mix with preferences beats either alone.",
    parts=("studies.budget", "objectives.sft.cross_entropy", "objectives.preference.dpo"),
    measure="target",
    better="higher",
    baseline="the whole budget on demonstrations, or the whole on preferences, whichever is better, each at its own best rate",
    within=(("small", 0.0),),
    seeds=(0, 1, 2),
    note="Demonstrations are of mixed quality (half careless); with demonstrations that are all right a mix gains nothing here",
    run=run,
)
