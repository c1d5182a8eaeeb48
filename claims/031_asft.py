"""[031] Anchored supervised fine-tuning: on noisy demonstrations, better than SFT and than DFT, without DFT's drift.

Task: sums of three digits in the head, of which the half-trained lab base knows a fifth; one demonstration in five is wrong.
Each objective at its own best rate, equal steps. Compared: held-out accuracy, against the better of SFT and DFT."""

import json

from temperament.bases import worlds
from temperament.bases.worlds.draw import Draw
from temperament.bases.worlds.rows import wrong
from temperament.run.claims import TUNED_ON, Claim

OBJECTIVES = {
    "asft": {"objectives.sft.asft": {"beta": 0.05}},
    "dft": "objectives.sft.dft",
    "sft": "objectives.sft.cross_entropy",
}
RATES = [1e-4, 4e-4]


def demonstrations(path, seed: int, rows: int = 1000, noise: float = 0.2) -> None:
    skill = worlds.skill("add3")
    items, draw = skill.items("train", rows, seed), Draw("noise", seed)
    said = [wrong(i, items, Draw("wrong", i.id, seed), skill.check) if draw.chance(noise) else i.answer for i in items]
    path.write_text("".join(json.dumps({"prompt": i.prompt, "completion": s}) + "\n" for i, s in zip(items, said, strict=True)))


def recipe(objective, rate: float, path: str) -> dict:
    return {
        "base": "lab/lm@half",
        "steps": [
            {
                "name": "sft",
                "train": {
                    "source": {"data.file": {"path": path, "holdout": 0}},
                    "objective": objective,
                    "trainable": "select.full",
                    "optimizer": {"optim.adamw": {"lr": {"schedules.constant": {"value": rate, "warmup": 10}}}},
                    "batch": 16,
                    "steps": 150,
                },
            }
        ],
        "evaluation": {
            "items": 100,
            "keep": False,
            "suites": [{"evaluate.lab": {"target": "add3", "retained": ["add", "subtract", "sort", "people"]}}],
        },
    }


def run(seed, lab):
    of = lambda seed: lab.made(f"noisy-{seed}.jsonl", lambda path: demonstrations(path, seed))
    got = {}
    for name, objective in OBJECTIVES.items():
        rate = lab.rate(name, lambda rate, o=objective: recipe(o, rate, of(TUNED_ON)), RATES)
        got[name] = lab.tune(name, recipe(objective, rate, of(seed)), seed) | {"rate": rate}
    best = max(("sft", "dft"), key=lambda n: got[n]["target"])
    return {"method": got["asft"] | {"kl_of_dft": got["dft"]["kl"]}, "baseline": got[best]}


claim = Claim(
    paper="031",
    title="Anchored Supervised Fine-Tuning",
    says="Weighing tokens by their probability and holding the model to its start beats both SFT and the weighing alone.",
    parts=("objectives.sft.asft", "objectives.sft.dft"),
    measure="target",
    better="higher",
    baseline="the better of SFT and DFT, each at its own best rate, equal steps",
    seeds=(0, 1, 2, 3, 4),
    run=run,
    note="`kl` of the method and `kl_of_dft` show the drift on retained skills",
    why=(
        "The anchor holds (KL 0.22 against 0.40, 6 points lost against 9) and costs gain: in 150 steps on a base that "
        "still learns, staying near is slower."
    ),
)
