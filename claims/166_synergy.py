"""[166] Merging a specialist with the model it came from: is the merge better than its parents on all that is asked?

Full fine-tuning to 90 % of a new task; then the tuned model and the base it came from are joined by SLERP, at the point that is
best on development items. What is asked is both halves at once: the mean of the new task and of what the base knew (its 20
skills, each half counting the same). Compared: the better of the two parents. `synergy` is against the mean of the parents, as
the paper reports it; `average` is the plain mean of weights. The paper found emergence at 7 and 8 billion parameters and none
at 1.7 billion.
"""

from temperament import parts
from temperament.delta import Delta
from temperament.run.claims import Claim
from temperament.run.scoring import Scorer

POINTS = (0.5, 0.7, 0.8, 0.9)  # 0 the base, 1 the specialist


def recipe() -> dict:
    return {
        "base": "lab/lm",
        "steps": [{
            "name": "sft",
            "train": {
                "source": {"data.lab": {"skills": ["shift"], "rows": 2000}},
                "optimizer": {"optim.adamw": {"lr": {"schedules.constant": {"value": 3e-4, "warmup": 10}}}},
                "batch": 16,
                "steps": 400,
                "stop": {"reach": 0.9, "every": 10, "items": 100},
            },
        }],
        "evaluation": {"items": 60, "suites": [{"evaluate.lab": {"target": "shift"}}], "diagnose": []},
        "check": False,
    }  # fmt: skip


def run(seed, lab):
    made = lab.run("full", recipe(), seed)
    parents = [Delta({}, base=dict(made.base.sha256)), made.delta]
    held, test = (Scorer(made.recipe, made.base, 60, development) for development in (True, False))
    both = lambda scorer, delta: 50 * ((s := scorer.summary(delta))["target"] + s["retained"])
    merged = {t: parts.build({"merge.slerp": {"t": t}}).merge(made.base, parents) for t in POINTS}
    best = max(POINTS, key=lambda t: both(held, merged[t]))
    ours, (base, tuned) = both(test, merged[best]), (both(test, p) for p in parents)
    average = both(test, parts.build("merge.linear").merge(made.base, parents))
    return {
        "method": {"both": ours, "t": best, "synergy": ours - (base + tuned) / 2},
        "baseline": {"both": max(base, tuned), "base": base, "tuned": tuned, "average": average},
    }


claim = Claim(
    paper="166",
    title="Fine-tuning LLMs for domain adaptation: strategies, scaling, model merging and synergistic capabilities",
    says="A merge of a specialist with the model it came from does better than either on new and old tasks together.",
    parts=("merge.slerp",),
    measure="both",
    better="higher",
    baseline="the better of the two parents",
    seeds=(0, 1, 2),
    run=run,
    why=(
        "The specialist alone is nearly the best of both (90.4 %); the merge is 21 points above the mean of its parents, "
        "as the paper says, and half a point above the better one."
    ),
)
