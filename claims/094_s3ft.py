"""[094] S3FT: training on one's own right answers, where there are any, teaches as much as the given ones and moves the model
less.

Task: sums worked out step by step, of which the lab base gets about half right; the given answers are worked in an unusual
notation, and there is room for it when they are asked. Both arms: the same rows, the same steps, each at its own best rate.
Compared: divergence from the base on retained skills, at no lower accuracy. (A first run was void: its base knew all of the
task, and answers in the taught notation were cut short.)
"""

import json

from temperament.bases import worlds
from temperament.run.claims import TUNED_ON, Claim

KNOWN = ["add", "subtract", "add-steps", "sort", "people"]
SUITE = {"evaluate.lab": {"target": "workout", "max_new": 100, "retained": KNOWN}}
RATES = [1e-4, 3e-4]


def unusual(answer: str) -> str:
    return answer.replace("; ", " | ").replace("+", " and ").replace("=", " is ").replace(" c", " carry ")


def given(path, seed: int, rows: int = 600) -> None:
    items = worlds.skill("workout").items("train", rows, seed)
    path.write_text("".join(json.dumps({"prompt": i.prompt, "completion": unusual(i.answer)}) + "\n" for i in items))


def recipe(arm: str, rate: float, path: str) -> dict:
    rows = {"data.file": {"path": path, "holdout": 0}}
    build = {"name": "own", "build": {"builder": {"data.s3ft": {"rows": rows, "retries": 4, "max_new": 60}}}}
    train = {
        "source": rows if arm == "sft" else {"data.file": {"path": "own", "holdout": 0}},
        "optimizer": {"optim.adamw": {"lr": {"schedules.constant": {"value": rate, "warmup": 10}}}},
        "batch": 16,
        "steps": 80,
    }
    steps = [*([build] if arm == "s3ft" else []), {"name": "train", "train": train}]
    aides = {"judge": {"aides.match": {"by": "number"}}}
    evaluation = {"items": 100, "keep": False, "suites": [SUITE]}
    return {"base": "lab/lm@half", "aides": aides, "steps": steps, "evaluation": evaluation}


def run(seed, lab):
    of = lambda seed: lab.made(f"given-{seed}.jsonl", lambda path: given(path, seed))
    arms = {}
    for arm in ("s3ft", "sft"):
        rate = lab.rate(arm, lambda rate, arm=arm: recipe(arm, rate, of(TUNED_ON)), RATES)
        arms[arm] = lab.tune(arm, recipe(arm, rate, of(seed)), seed) | {"rate": rate}
    return {"method": arms["s3ft"], "baseline": arms["sft"]}


claim = Claim(
    paper="094",
    title="Selective Self-to-Supervised Fine-Tuning for Generalization in Large Language Models",
    says="Training on one's own right answers keeps the model nearer to what it was, at no lower accuracy.",
    parts=("data.s3ft", "aides.match"),
    measure="kl",
    better="lower",
    baseline="SFT on the given answers, equal steps, its own best rate",
    within=(("target", 0.01),),
    seeds=(0, 1, 2),
    run=run,
    note="the unusual notation is not learnt in as many steps: its answers are whole, and wrong",
)
