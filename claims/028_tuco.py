"""[028] TuCo: prompts that get round what was tuned owe less of their answer to the tuning.

Tuned on one new procedure to 90 %, the lab base answers many questions of the same form as if they were the new task. They are
asked in a phrasing the tuning never saw (conjugate prompting, one of the paper's attacks); some come through and the old skill
answers. Compared: how well TuCo tells these from those that tuning took over, against chance - the AUC over pairs of questions
of one skill and one length, so that neither explains it. Recorded: mean contributions in both phrasings, and accuracy with the
contributions scaled inside the forward pass.
"""

import json
import re

from temperament.bases import worlds
from temperament.run.claims import Claim
from temperament.run.diagnose import diagnose

NEAR, ITEMS = ["copy", "reverse", "sort", "rotate", "upper"], 100
PHRASED = [
    [r"copy:(.*) =", r"Write\1 again:"],
    [r"reverse:(.*) =", r"Write\1 backwards:"],
    [r"sort:(.*) =", r"Put\1 in order:"],
    [r"rotate:(.*) =", r"Move the first of\1 to the end:"],
    [r"upper:(.*) =", r"Write\1 in capitals:"],
]
ALPHA = 0.75
EVALUATION = {"items": ITEMS, "keep": False, "suites": [{"evaluate.lab": {"target": "shift", "retained": NEAR}}]}


def rephrased(prompt: str) -> str:
    return next((m.expand(new) for old, new in PHRASED if (m := re.fullmatch(old, prompt, re.S))), prompt)


def run(seed, lab):
    train = {
        "source": {"data.lab": {"skills": ["shift"], "rows": 2000}},
        "optimizer": {"optim.adamw": {"lr": {"schedules.constant": {"value": 3e-4, "warmup": 10}}}},
        "batch": 16,
        "steps": 400,
        "stop": {"reach": 0.9, "every": 10, "items": 100},
    }
    recipe = {"base": "lab/lm", "steps": [{"name": "sft", "train": train}], "evaluation": EVALUATION}
    plain, folder = lab.tune("tuned", recipe, seed), lab.folder / f"tuned-{seed}"
    merge = {"name": "tuned", "merge": {"method": "merge.linear", "of": [str(folder)]}}
    system = lambda part: {"base": "lab/lm", "steps": [merge], "inference": [part], "evaluation": EVALUATION}
    lab.tune("conjugate", system({"decode.conjugate_prompt": {"rewrite": PHRASED}}), seed)
    scaled = lab.tune(f"scaled-{ALPHA}", system({"decode.ftc_scaling": {"alpha": ALPHA}}), seed)

    asked = [i.prompt for n in NEAR for i in worlds.skill(n).items("test", ITEMS)]
    tuco = contribution(lab, folder, {"plain": asked, "rephrased": [rephrased(p) for p in asked]}, seed)
    right = {"plain": outcomes(folder), "rephrased": outcomes(lab.folder / f"conjugate-{seed}")}
    near = lambda numbers: sum(numbers["skills"][n]["after"] for n in NEAR) / len(NEAR)
    alike = [(k // ITEMS, len(p.split())) for k, p in enumerate(asked)]
    auc = {name: separates(tuco[name], right[name], alike) for name in tuco}
    method = {"auc": auc["rephrased"], "auc_plain": auc["plain"]}
    for name in tuco:
        method |= {f"tuco_{name}": mean(tuco[name]), f"near_{name}": mean(right[name])}
    method |= {"target": plain["target"], "target_scaled": scaled["target"], "near_scaled": near(scaled)}
    return {"method": method, "baseline": {"auc": 0.5}}


def contribution(lab, folder, sets, seed) -> dict[str, list[float]]:
    """TuCo of every prompt of each set."""
    files = {name: lab.folder / f"{name}-{seed}.jsonl" for name in sets}
    for name, prompts in sets.items():
        files[name].write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    rows = {name: {"data.file": {"path": str(file), "holdout": 0}} for name, file in files.items()}
    part = {"diagnose.tuco": {"sets": rows, "items": len(NEAR) * ITEMS}}
    found = diagnose("lab/lm", str(folder), [part])["diagnoses"]["diagnose.tuco"]
    return {s["set"]: s["values"] for s in found["sets"]}


def outcomes(folder) -> list[float]:
    items = json.loads((folder / "items.json").read_text())
    return [i["score_after"] for n in NEAR for i in items[n]]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def separates(values: list[float], right: list[float], alike: list[tuple]) -> float:
    """P(TuCo of a question that tuning took over > TuCo of one that the old skill answered), over pairs that are alike."""
    rows = list(zip(values, right, alike, strict=True))
    taken, kept = ([(v, a) for v, r, a in rows if r == want] for want in (0, 1))
    return mean([(x > y) + 0.5 * (x == y) for x, a in taken for y, b in kept if a == b])


claim = Claim(
    paper="028",
    title="Measuring the Contribution of Fine-Tuning to Individual Responses of LLMs",
    says="Of prompts meant to get round what a model was tuned to do, those that succeed have the lower tuning contribution.",
    parts=("diagnose.tuco", "decode.ftc_scaling"),
    measure="auc",
    better="higher",
    baseline="chance",
    seeds=(0, 1, 2, 3, 4),
    run=run,
    note="tuco_plain and tuco_rephrased: whether the phrasing alone lowers the mean; *_scaled: accuracy at alpha 0.75",
)
