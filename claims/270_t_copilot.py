"""[270] Transformer Copilot: a second model that learned from the log of the first one's mistakes corrects it while decoding.

Task: a new operator, a # b = a + 2 b, stopped while the pilot still errs. The copilot changes nothing in the training of
the pilot (clip: null), so the arms differ by what is added while decoding. Compared: held-out accuracy of pilot and copilot
against the pilot alone, each at its own best rate. Beside it the pilot alone with twice the updates, more than a copilot costs.
"""

from temperament.run.claims import Claim

RATES, STEPS = [3e-4, 6e-4, 1e-3], 150
SUITE = {"evaluate.lab": {"target": "operator", "retained": ["add", "subtract", "sort", "people"]}}
EVALUATION = {"items": 200, "keep": False, "suites": [SUITE]}
COPILOT = {"adapters.copilot": {"layers": 4, "factor": 3.0}}


def recipe(rate: float, copilot: bool, steps: int) -> dict:
    train = {
        "source": {"data.lab": {"skills": ["operator"], "rows": 1500}},
        "trainable": ["select.full", COPILOT] if copilot else ["select.full"],
        "optimizer": {"optim.adamw": {"lr": {"schedules.constant": {"value": rate, "warmup": 5}}}},
        "clip": None,
        "batch": 16,
        "steps": steps,
    }
    system = {"inference": ["decode.copilot"]} if copilot else {}
    return {"base": "lab/lm", "steps": [{"name": "sft", "train": train}], "evaluation": EVALUATION} | system


def run(seed, lab):
    method = lab.best("copilot", lambda rate: recipe(rate, True, STEPS), RATES, seed)
    baseline = lab.best("pilot", lambda rate: recipe(rate, False, STEPS), RATES, seed)
    longer = lab.tune("longer", recipe(baseline["rate"], False, 2 * STEPS), seed)
    return {"method": method, "baseline": baseline | {"longer": longer["target"]}}


claim = Claim(
    paper="270",
    title="Transformer Copilot: Learning from The Mistake Log in LLM Fine-tuning",
    says="A copilot trained on the log of the pilot's mistakes, added to its probabilities while decoding, raises accuracy.",
    parts=("adapters.copilot", "decode.copilot"),
    measure="target",
    better="higher",
    baseline="the pilot alone on the same data, its own best rate",
    seeds=(0, 1, 2),
    run=run,
    note="`longer` is the pilot alone with twice the updates",
    why=(
        "The copilot mends about as many answers as it spoils (1, 1 and -2 points on three seeds); twice the updates of the "
        "pilot alone, which cost less, take it from 33 % to 88 %."
    ),
)
