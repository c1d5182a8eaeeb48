"""[248] Breadcrumbs: settings found for two tasks serve for six, where plain task arithmetic needs another strength.

Six procedures are taught apart, each by full fine-tuning of one base to 90 % of its task. For Breadcrumbs and for task
arithmetic the strength that is best for the first two tasks (on development items) is used unchanged to merge all six.
Compared: mean accuracy over the six tasks on held-out items. Printed beside it: TIES at its own best strength for the two
tasks, and the plain average.
"""

from temperament import parts
from temperament.run.claims import Claim
from temperament.run.recipe import read
from temperament.run.scoring import Scorer

TASKS = ("shift", "operator", "swap", "ticket", "interleave", "newcomers")
STRENGTHS = (0.2, 0.3, 0.5, 0.7, 1.0, 1.5)
METHODS = {
    "method": lambda a: {"merge.breadcrumbs": {"density": 0.2, "gamma": 0.01, "scale": a}},
    "baseline": lambda a: {"merge.task_arithmetic": {"scale": a}},
    "ties": lambda a: {"merge.ties": {"density": 0.2, "scale": a}},
}


def recipe(task: str, items: int = 60) -> dict:
    source = {"data.lab": {"skills": [task], "rows": 2000}}
    optimizer = {"optim.adamw": {"lr": {"schedules.constant": {"value": 3e-4, "warmup": 10}}}}
    stop = {"skill": task, "reach": 0.9, "every": 20, "items": items}
    train = {"source": source, "optimizer": optimizer, "batch": 16, "steps": 400, "stop": stop}
    suites = [{"evaluate.lab": {"target": task, "retained": ["copy"]}}]
    return {"base": "lab/lm", "steps": [{"name": "full", "train": train}], "check": False,
            "evaluation": {"items": items, "suites": suites, "diagnose": []}}  # fmt: skip


def scores(base, tasks, items=60, development=False):
    suites = [{"evaluate.lab": {"target": t, "retained": ["copy", "add"]}} for t in tasks]
    spec = read({"base": "lab/lm", "evaluation": {"items": items, "suites": suites}})
    return Scorer(spec, base, items, development)


def run(seed, lab):
    made = [lab.run(task, recipe(task), seed) for task in TASKS]
    base, deltas = made[0].base, [m.delta for m in made]
    few, many, found = scores(base, TASKS[:2], development=True), scores(base, TASKS), {}
    for side, method in METHODS.items():
        of = lambda a, chosen, method=method: parts.build(method(a)).merge(base, chosen)
        tried = {a: few(of(a, deltas[:2])) for a in STRENGTHS}
        best = max(STRENGTHS, key=lambda a: (tried[a], -a))
        two, six = few(of(best, deltas[:2])), many.summary(of(best, deltas))
        found[side] = {
            "target": 100 * six["target"],
            "retained_change": six["retained_change"],
            "two_tasks": 100 * two,
            "strength": best,
        }
    ties = found.pop("ties")
    found["method"] |= {f"ties_{k}": ties[k] for k in ("target", "strength")}
    found["baseline"]["average"] = 100 * many(parts.build("merge.linear").merge(base, deltas))
    return found


claim = Claim(
    paper="248",
    title="Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
    says="With a strength found for two tasks, merging six by Breadcrumbs keeps more of them than task arithmetic.",
    parts=("merge.breadcrumbs",),
    measure="target",
    better="higher",
    baseline="merge.task_arithmetic, its strength found on the same two tasks",
    seeds=(0, 1, 2),
    run=run,
    why=(
        "Breadcrumbs and task arithmetic keep as much of six tasks (15.4 %, plain averaging 0.8 %): masks of outliers "
        "save nothing that a found strength does not."
    ),
)
