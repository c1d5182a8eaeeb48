"""[120] Model soups: the mean of fine-tunes that differ in rate and data order beats the best of them, at no cost in use.

Five fine-tunes of a vision transformer learn eight figures from twenty pictures each, with different rates and orders, their
heads begun alike. The greedy soup adds them to a mean as long as accuracy on development pictures does not fall. Compared, on
held-out pictures: the greedy soup with the single model that is best on the same development pictures. Beside it the uniform
soup, and one learned by gradient on pictures of its own. (With five fine-tunes of the language model on one procedure, of
which the slower were not done, the greedy soup was the best model alone, 97.8 %, and the uniform one had 53.3 %.)
"""

from temperament import parts
from temperament.run.claims import Claim
from temperament.run.scoring import Scorer

RATES = (5e-4, 7e-4, 1e-3, 1.4e-3, 2e-3)
FIGURES = {"data.sprites": {"figures": 8, "rows": 160}}
OTHERS = {"data.sprites": {"figures": 8, "rows": 160, "seed": 1}}  # the learned soup's
SUITES = [{"evaluate.pictures": {"of": FIGURES}}, "evaluate.pictures"]
EVALUATION = {"items": 60, "suites": SUITES, "keep": False, "diagnose": []}


def fine_tune(rate: float, steps: int = 100) -> dict:
    train = {
        "source": FIGURES,
        "objective": "objectives.classify.cross_entropy",
        "trainable": ["select.full", {"adapters.class_head": {"of": FIGURES}}],
        "optimizer": {"optim.adamw": {"lr": {"schedules.cosine": {"peak": rate, "warmup": 10}}}},
        "batch": 16,
        "micro": 16,
        "steps": steps,
    }
    return {"base": "lab/vit", "steps": [{"name": "full", "train": train}], "check": False, "evaluation": EVALUATION}


def learned(folders: list[str], steps: int = 40) -> dict:
    names = [f"model-{k}" for k in range(len(folders))]
    known = [
        {"name": n, "merge": {"method": "merge.linear", "of": [f]}, "ledger": False}
        for n, f in zip(names, folders, strict=True)
    ]
    train = {
        "source": OTHERS,
        "objective": "objectives.classify.cross_entropy",
        "trainable": {"merge.soup_learned": {"of": names}},
        "optimizer": {"optim.adamw": {"lr": 0.1}},
        "batch": 32,
        "micro": 32,
        "steps": steps,
    }
    steps_ = [*known, {"name": "learned", "start": "base", "train": train}]
    return {"base": "lab/vit", "steps": steps_, "check": False, "evaluation": EVALUATION}


def run(seed, lab):
    made = [lab.run(f"rate-{r:g}", fine_tune(r), 100 * seed + k) for k, r in enumerate(RATES)]
    mixed = lab.run("learned", learned([str(m.folder) for m in made]), seed)
    base, deltas = made[0].base, [m.delta for m in made]
    held, test = (Scorer(made[0].recipe, base, 400, development) for development in (True, False))
    soup, tried = parts.build("merge.soup_greedy").search(base, deltas, held)
    numbers = lambda d: {"target": 100 * (s := test.summary(d))["target"], "retained_change": s["retained_change"]}
    greedy, single = numbers(soup), numbers(deltas[tried["order"][0]])
    uniform = numbers(parts.build("merge.soup_uniform").merge(base, deltas))
    beside = {"models": len(tried["kept"]), "uniform": uniform["target"], "learned": numbers(mixed.delta)["target"]}
    return {"method": greedy | beside, "baseline": single}


claim = Claim(
    paper="120",
    title="Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time",
    says="A greedy soup of fine-tunes is more accurate on held-out items than the best single one of them.",
    parts=("merge.soup_greedy",),
    measure="target",
    better="higher",
    baseline="the fine-tune that is best on the same development items",
    within=(("retained_change", 2.0),),
    seeds=(0, 1, 2),
    run=run,
    note="`uniform`, `learned`: the other soups; `models`: how many of five the greedy one holds",
    why=(
        "Fine-tunes of a transformer this small part ways: the mean of five has 65 % where the best alone has 73 %, so the "
        "greedy soup keeps one to three of them and gains nothing; the learned one finds the best alone."
    ),
)
