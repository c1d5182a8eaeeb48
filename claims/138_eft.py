"""[138] Emulated fine-tuning: the behaviour of a small tuned model and the knowledge of another, added while decoding, nothing
trained.

A stands in for the large model: the lab base after learning newcomers (facts the other does not have). The small one learned a
procedure (`shift`) instead.
Compared: the mean of both skills when A decodes with the small model's log-ratio, against the better of A and the small model
alone.
"""

from temperament.run.claims import Claim

SUITE = {"evaluate.lab": {"target": "shift", "retained": ["newcomers", "reverse", "sort", "add", "people"]}}
EVALUATION = {"items": 100, "keep": False, "suites": [SUITE]}


def taught(skill: str, rate: float, steps: int) -> dict:
    train = {
        "source": {"data.lab": {"skills": [skill], "rows": 1500}},
        "optimizer": {"optim.adamw": {"lr": {"schedules.constant": {"value": rate, "warmup": 10}}}},
        "batch": 16,
        "steps": steps,
    }
    return {"base": "lab/lm", "steps": [{"name": skill, "train": train}], "evaluation": EVALUATION}


def both(numbers: dict) -> float:
    return (numbers["skills"]["shift"]["after"] + numbers["skills"]["newcomers"]["after"]) / 2


def run(seed, lab):
    knows, does = lab.tune("knows", taught("newcomers", 3e-4, 200), seed), lab.tune("does", taught("shift", 3e-4, 200), seed)
    small = str(lab.folder / f"does-{seed}")
    merge = {"name": "knows", "merge": {"method": "merge.linear", "of": [str(lab.folder / f"knows-{seed}")]}}
    system = {
        "base": "lab/lm",
        "steps": [merge],
        "inference": [{"decode.eft": {"tuned": small, "reference": "lab/lm", "draft": 4}}],
    }
    emulated = lab.tune("eft", system | {"evaluation": EVALUATION}, seed)
    return {"method": emulated | {"both": both(emulated)}, "baseline": {"both": max(both(knows), both(does))}}


claim = Claim(
    paper="138",
    title="An Emulator for Fine-Tuning Large Language Models using Small Language Models",
    says="Adding a tuned model's log-ratio to another model's logits gives the behaviour of the one with the knowledge "
    "of the other.",
    parts=("decode.eft",),
    measure="both",
    better="higher",
    baseline="the better of the two models alone",
    seeds=(0, 1, 2),
    run=run,
    note="scale stands for knowledge here: both are the same size, and one was taught facts the other lacks",
)
