"""[120] Model soups: the mean of fine-tunes that differ in rate and data order beats the best of them, at no cost in use.

Five fine-tunes of one base on one procedure with different rates and rows. The greedy soup adds them to a mean as long as
accuracy on development items does not fall. Compared, on held-out items: the greedy soup with the single model that is best
on the same development items. The task is not taught to the end, so that there is something to gain.
"""

from dataclasses import replace

from temperament import parts
from temperament.run.claims import Claim
from temperament.run.recipe import read
from temperament.run.scoring import Scorer

RATES = (1e-4, 2e-4, 3e-4, 5e-4, 8e-4)
TASK = "interleave"


def recipe(rate: float, steps: int = 120, items: int = 60) -> dict:
    source = {"data.lab": {"skills": [TASK], "rows": 600}}
    train = {
        "source": source,
        "optimizer": {"optim.adamw": {"lr": {"schedules.cosine": {"peak": rate, "warmup": 10}}}},
        "batch": 16,
        "steps": steps,
    }
    suites = [{"evaluate.lab": {"target": TASK}}]
    return {"base": "lab/lm", "steps": [{"name": "full", "train": train}], "check": False,
            "evaluation": {"items": items, "suites": suites, "diagnose": []}}  # fmt: skip


def run(seed, lab):
    made = [lab.run(f"rate-{r:g}", replace(read(recipe(r)), seed=100 * seed + k), seed) for k, r in enumerate(RATES)]
    base, deltas = made[0].base, [m.delta for m in made]
    held, test = (Scorer(made[0].recipe, base, 200, development) for development in (True, False))
    soup, tried = parts.build("merge.soup_greedy").search(base, deltas, held)
    single = deltas[tried["order"][0]]
    uniform = parts.build("merge.soup_uniform").merge(base, deltas)
    numbers = lambda d: {"target": 100 * (s := test.summary(d))["target"], "retained_change": s["retained_change"]}
    return {
        "method": numbers(soup) | {"models": len(tried["kept"])},
        "baseline": numbers(single) | {"uniform": numbers(uniform)["target"]},
    }


claim = Claim(
    paper="120",
    title="Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time",
    says="A greedy soup of fine-tunes is more accurate on held-out items than the best single one of them.",
    parts=("merge.soup_greedy",),
    measure="target",
    better="higher",
    baseline="the fine-tune that is best on the same development items",
    within=(("retained_change", 2.0),),
    seeds=(0, 1, 2, 3, 4),
    run=run,
)
