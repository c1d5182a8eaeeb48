"""[120] Model soups: the mean of fine-tunes that differ in rate and data order beats the best of them, at no cost in use.

Five fine-tunes of one base on one procedure with different rates and rows. The greedy soup adds them to a mean as long as
accuracy on development items does not fall. Compared, on held-out items: the greedy soup with the single model that is best
on the same development items. The task is not taught to the end, so that there is something to gain. Beside it, as `vit`: the
same of five fine-tunes of a vision transformer that learns eight figures, their heads begun alike, on held-out pictures.
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


def pictures(rate: float, steps: int = 60, items: int = 60) -> dict:
    figures = {"data.sprites": {"figures": 8, "rows": 160}}
    train = {
        "source": figures,
        "objective": "objectives.classify.cross_entropy",
        "trainable": ["select.full", {"adapters.class_head": {"of": figures}}],
        "optimizer": {"optim.adamw": {"lr": {"schedules.cosine": {"peak": rate, "warmup": 10}}}},
        "batch": 16,
        "micro": 16,
        "steps": steps,
    }
    suites = [{"evaluate.pictures": {"of": figures}}, "evaluate.pictures"]
    return {"base": "lab/vit", "steps": [{"name": "full", "train": train}], "check": False,
            "evaluation": {"items": items, "suites": suites, "keep": False, "diagnose": []}}  # fmt: skip


def cooked(lab, name: str, recipe, seed: int) -> dict[str, dict[str, float]]:
    """The numbers of the greedy soup, of the best single model and of the uniform soup of one set of fine-tunes."""
    made = [lab.run(f"{name}-{r:g}", replace(read(recipe(r)), seed=100 * seed + k), seed) for k, r in enumerate(RATES)]
    base, deltas = made[0].base, [m.delta for m in made]
    held, test = (Scorer(made[0].recipe, base, 200, development) for development in (True, False))
    soup, tried = parts.build("merge.soup_greedy").search(base, deltas, held)
    numbers = lambda d: {"target": 100 * (s := test.summary(d))["target"], "retained_change": s["retained_change"]}
    return {
        "greedy": numbers(soup) | {"models": len(tried["kept"])},
        "single": numbers(deltas[tried["order"][0]]),
        "uniform": numbers(parts.build("merge.soup_uniform").merge(base, deltas)),
    }


def run(seed, lab):
    words, seen = cooked(lab, "rate", recipe, seed), cooked(lab, "vit", pictures, seed)
    return {
        "method": words["greedy"] | {"vit": seen["greedy"]["target"], "vit_models": seen["greedy"]["models"]},
        "baseline": words["single"] | {"uniform": words["uniform"]["target"], "vit": seen["single"]["target"],
                                       "vit_uniform": seen["uniform"]["target"]},
    }  # fmt: skip


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
