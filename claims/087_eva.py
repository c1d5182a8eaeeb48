"""[087] EVA: a low-rank adapter that begins at the directions its inputs vary in reaches the target in fewer steps than LoRA.

Both have the same budget of ranks and stop at 90 % of a new procedure, each at its own best learning rate. Compared: steps.
"""

from temperament.run.claims import Claim

RANK = 4
METHODS = {
    "eva": {"rank": RANK, "init": {"adapters.init.eva": {"rho": 2.0}}},
    "lora": {"rank": RANK},
}
RATES = [1e-3, 2e-3, 4e-3]


def recipe(options: dict, rate: float, steps: int = 400, items: int = 100) -> dict:
    return {
        "base": "lab/lm",
        "steps": [{
            "name": "sft",
            "train": {
                "source": {"data.lab": {"skills": ["shift"], "rows": 2000}},
                "trainable": {"adapters.lora": options},
                "optimizer": {"optim.adamw": {"lr": {"schedules.constant": {"value": rate, "warmup": 10}}}},
                "batch": 16,
                "steps": steps,
                "stop": {"reach": 0.9, "every": 5, "items": items},
            },
        }],
        "evaluation": {"items": items, "suites": [{"evaluate.lab": {"target": "shift"}}]},
    }  # fmt: skip


def fastest(lab, name: str, seed: int) -> dict:
    """The method at the rate that reached the target in the fewest steps."""
    worth = lambda numbers: (numbers["reached"], -numbers["steps"])
    return lab.best(name, lambda rate: recipe(METHODS[name], rate), RATES, seed, worth)


def run(seed, lab):
    return {"method": fastest(lab, "eva", seed), "baseline": fastest(lab, "lora", seed)}


claim = Claim(
    paper="087",
    title="One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
    says="Beginning at the principal directions of its inputs, with ranks redistributed, LoRA reaches the target sooner.",
    parts=("adapters.init.eva", "adapters.lora"),
    measure="steps",
    better="lower",
    baseline="adapters.lora of the same rank, its own best learning rate, the same stop at 90 %",
    within=(("target", 0.02),),
    why=(
        "Sooner on each of five seeds (45 to 60 steps against 55 to 65), but both stop at 90 % of a hundred items, and by "
        "the last items it stands 2 points lower there."
    ),
    seeds=(0, 1, 2, 3, 4),
    run=run,
)
