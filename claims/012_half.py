"""[012] Half fine-tuning: at the same gain, training half of the weights forgets less than training all of them.

Task: a new procedure, near to what the lab base knows. Both methods stop at 90 % of it, each at its own best learning rate
(chosen on a seed of its own). Compared: percentage points lost on average over what the base knew.
"""

from temperament.run.claims import Claim

RATES = {"select.half": [3e-4, 6e-4, 1.2e-3], "select.full": [1.5e-4, 3e-4, 6e-4]}


def recipe(method: str, rate: float, target: str = "shift") -> dict:
    return {
        "base": "lab/lm",
        "steps": [{
            "name": "sft",
            "train": {
                "source": {"data.lab": {"skills": [target], "rows": 2000}},
                "trainable": method,
                "optimizer": {"optim.adamw": {"lr": {"schedules.constant": {"value": rate, "warmup": 10}}}},
                "batch": 16,
                "steps": 400,
                "stop": {"reach": 0.9, "every": 10, "items": 100},
            },
        }],
        "evaluation": {"items": 100, "suites": [{"evaluate.lab": {"target": target}}]},
    }  # fmt: skip


def run(seed, lab):
    numbers = {m: lab.best(m, lambda rate, m=m: recipe(m, rate), RATES[m], seed) for m in RATES}
    return {"method": numbers["select.half"], "baseline": numbers["select.full"]}


claim = Claim(
    paper="012",
    title="HFT: Half Fine-Tuning for Large Language Models",
    says="Half fine-tuning forgets less than full fine-tuning at an equal gain.",
    parts=("select.half",),
    measure="loss",
    better="lower",
    baseline="select.full, its own best learning rate, the same stop at 90 %",
    within=(("target", 0.02),),
    seeds=(0, 1, 2, 3, 4),
    run=run,
    why=(
        "The half that is trained needs as many steps as the whole and drifts as far (KL 0.11 against 0.09), so the "
        "losses of the two cannot be told apart."
    ),
)
