"""[247] Catastrophic forgetting as implicit inference: much of what tuning loses is suppressed, and comes back when asked in
another form.

Tuned on one new procedure to 90 %, the lab base answers prompts of the same form as if they were the new task. The same
questions are asked in a phrasing the tuning never touched. Compared: mean accuracy on the near skills, tuned, with and without;
the base's own difference is recorded.
"""

from temperament.run.claims import Claim

NEAR = ["copy", "reverse", "sort", "rotate", "upper"]
SUITE = {"evaluate.lab": {"target": "shift", "retained": NEAR}}
EVALUATION = {"items": 100, "keep": False, "suites": [SUITE]}
PHRASED = [
    [r"copy:(.*) =", r"Write\1 again:"],
    [r"reverse:(.*) =", r"Write\1 backwards:"],
    [r"sort:(.*) =", r"Put\1 in order:"],
    [r"rotate:(.*) =", r"Move the first of\1 to the end:"],
    [r"upper:(.*) =", r"Write\1 in capitals:"],
]


def run(seed, lab):
    train = {
        "source": {"data.lab": {"skills": ["shift"], "rows": 2000}},
        "optimizer": {"optim.adamw": {"lr": {"schedules.constant": {"value": 3e-4, "warmup": 10}}}},
        "batch": 16,
        "steps": 400,
        "stop": {"reach": 0.9, "every": 10, "items": 100},
    }
    plain = lab.tune("tuned", {"base": "lab/lm", "steps": [{"name": "sft", "train": train}], "evaluation": EVALUATION}, seed)
    merge = {"name": "tuned", "merge": {"method": "merge.linear", "of": [str(lab.folder / f"tuned-{seed}")]}}
    system = {"base": "lab/lm", "steps": [merge], "inference": [{"decode.conjugate_prompt": {"rewrite": PHRASED}}]}
    other = lab.tune("conjugate", system | {"evaluation": EVALUATION}, seed)
    mean = lambda numbers, when: sum(numbers["skills"][n][when] for n in NEAR) / len(NEAR)
    base = {"base": mean(other, "before"), "gap_of_base": mean(other, "before") - mean(plain, "before")}
    return {
        "method": {"near": mean(other, "after"), **base},
        "baseline": {"near": mean(plain, "after"), "base": mean(plain, "before")},
    }


claim = Claim(
    paper="247",
    title="Understanding Catastrophic Forgetting in Language Models via Implicit Inference",
    says="Asked in a form far from the tuning, a tuned model recovers much of what it seems to have forgotten.",
    parts=("decode.conjugate_prompt",),
    measure="near",
    better="higher",
    baseline="the same tuned model, asked as the items stand",
    seeds=(0, 1, 2, 3, 4),
    run=run,
    note="`gap_of_base` is what the other phrasing changes for the base itself: suppression is what exceeds it",
)
