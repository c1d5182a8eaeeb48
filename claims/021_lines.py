"""[021] LiNeS: scaling the change down in shallow blocks restores what was known at nearly the full gain, better than scaling
it evenly.

A run of full fine-tuning to 90 % of a new task; then its dial, with no training. Compared at the same target accuracy: for each
point of even scaling, LiNeS's best retained accuracy among its points whose target is at least as high. The number is the mean
retained accuracy over both curves at target levels both reach (area between the curves, in percentage points).
"""

from dataclasses import replace

from temperament.run.claims import Claim
from temperament.run.dial import dial
from temperament.run.recipe import Dial
from temperament.run.skills import skills_of
from temperament.run.state import place_on

STRENGTHS = [0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
LEVELS = [0.1 * k for k in range(1, 9)]  # targets at which the curves are compared


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
        "evaluation": {"items": 100, "suites": [{"evaluate.lab": {"target": "shift"}}], "diagnose": []},
        "check": False,
    }  # fmt: skip


def run(seed, lab):
    made = lab.run("full", recipe(), seed)
    base = place_on(made.base, replace(made.state, delta=None))
    points = dial(
        skills_of(made.recipe, base), made.delta, Dial(strengths=STRENGTHS, shape=["merge.linear", "merge.lines"], items=60)
    )["points"]
    curves = {s: [p for p in points if p["shape"] == s] for s in ("merge.linear", "merge.lines")}
    best = {
        s: [max((p["retained"] for p in ps if p["target"] >= level), default=0.0) for level in LEVELS]
        for s, ps in curves.items()
    }
    numbers = {
        s: {"retained_at_equal_target": 100 * sum(v) / len(v), "full_strength_target": curves[s][-1]["target"]}
        for s, v in best.items()
    }
    return {"method": numbers["merge.lines"], "baseline": numbers["merge.linear"]}


claim = Claim(
    paper="021",
    title="LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging",
    says="Layer-increasing scaling keeps more of what was known than even scaling (WiSE-FT) at the same target accuracy.",
    parts=("merge.lines",),
    measure="retained_at_equal_target",
    better="higher",
    baseline="merge.linear: the same change scaled evenly",
    seeds=(0, 1, 2, 3, 4),
    run=run,
)
