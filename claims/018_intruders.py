"""[018] LoRA vs full fine-tuning, an illusion of equivalence: low-rank adapters bring intruder dimensions, full tuning does
not.

Both reach 90 % of the same new task. Compared: new high-ranking singular directions (of the 10 leading ones of every matrix,
those whose overlap with every base direction is below 0.5), low-rank against full.
"""

from temperament.run.claims import Claim
from temperament.run.study import summary


def recipe(trainable, rate: float) -> dict:
    return {
        "base": "lab/lm",
        "steps": [
            {
                "name": "sft",
                "train": {
                    "source": {"data.lab": {"skills": ["shift"], "rows": 2000}},
                    "trainable": trainable,
                    "optimizer": {"optim.adamw": {"lr": {"schedules.constant": {"value": rate, "warmup": 10}}}},
                    "batch": 16,
                    "steps": 500,
                    "stop": {"reach": 0.9, "every": 10, "items": 100},
                },
            }
        ],
        "evaluation": {
            "items": 100,
            "suites": [{"evaluate.lab": {"target": "shift"}}],
            "diagnose": ["diagnose.intruder_dimensions"],
        },
        "check": False,
    }


def one(lab, name: str, seed: int, trainable, rate: float) -> dict:
    run = lab.run(name, recipe(trainable, rate), seed).json
    return summary(run) | {"intruders": run["diagnoses"]["diagnose.intruder_dimensions"]["intruders"]}


def run(seed, lab):
    low = one(lab, "lora", seed, {"adapters.lora": {"rank": 4}}, 3e-3)
    full = one(lab, "full", seed, "select.full", 3e-4)
    return {"method": low, "baseline": full}


claim = Claim(
    paper="018",
    title="LoRA vs Full Fine-tuning: An Illusion of Equivalence",
    says="At an equal gain low-rank adapters have intruder dimensions and full fine-tuning has none; with them goes "
    "more forgetting.",
    parts=("diagnose.intruder_dimensions",),
    measure="intruders",
    better="higher",
    baseline="select.full, the same stop at 90 %",
    within=(("target", 0.05),),
    seeds=(0, 1, 2, 3, 4),
    run=run,
    note="`loss` of both sides is recorded: the paper's second finding, more forgetting with intruders, is read there",
)
