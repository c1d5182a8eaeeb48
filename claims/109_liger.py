"""[109] Liger: attention turned into a gated recurrence with a window, healed by LoRA, comes back near to the model it was.

The lab base is converted and healed on what it was trained for, by LoRA on q, k, v with plain next-token loss. Compared with
the same conversion without gates, healed alike, each at its own best rate: nats per token on held-out natural text. Recorded
beside: the unconverted base.
"""

from temperament.run.claims import Claim
from temperament.run.study import summary

METHODS = {
    "liger": {"window": 16},
    "ungated": {"window": 16, "gates": False},
}
LORA = {"adapters.lora": {"rank": 8, "targets": ["q", "k", "v"]}}
RATES = {"liger": [4e-3], "ungated": [8e-3]}  # the best of 1e-3 to 16e-3, on a seed of their own
HEAL = ["text", "copy", "add", "people"]


def recipe(options: dict, rate: float, steps: int = 200, items: int = 60) -> dict:
    return {
        "base": "lab/lm",
        "check": False,
        "steps": [{
            "name": "heal",
            "train": {
                "source": {"data.lab": {"skills": HEAL, "rows": 4000}},
                "trainable": [{"surgery.liger": options}, LORA],
                "optimizer": {"optim.adamw": {"lr": {"schedules.cosine": {"peak": rate, "warmup": 10}}}},
                "batch": 16,
                "steps": steps,
            },
        }],
        "evaluation": {"items": items, "diagnose": [], "suites": [{"evaluate.lab": {"target": "text", "retained": HEAL[1:]}}]},
    }  # fmt: skip


def one(lab, name: str, seed: int) -> dict:
    rate = lab.rate(name, lambda rate: recipe(METHODS[name], rate), RATES[name])
    json = lab.run(name, recipe(METHODS[name], rate), seed).json
    text = next(s for s in json["ledger"]["skills"] if s["name"] == "text")
    return summary(json) | {"text_nll": text["nll"]["after"], "base_nll": text["nll"]["before"], "rate": rate}


def run(seed, lab):
    healed, plain = (one(lab, name, seed) for name in METHODS)
    return {"method": healed, "baseline": plain}


claim = Claim(
    paper="109",
    title="Liger: Linearizing Large Language Models to Gated Recurrent Structures",
    says="With gates read off the keys a converted model heals nearer to its teacher than without.",
    parts=("surgery.liger", "adapters.lora"),
    measure="text_nll",
    better="lower",
    baseline="the same conversion without gates, healed alike",
    seeds=(0, 1, 2),
    run=run,
    note="`base_nll`: the unconverted base",
    why=(
        "At a rate of 1e-3 for both the gates help (3.24 nats against 3.29); at each one's own best rate, 4e-3 and 8e-3, LoRA "
        "on q, k, v has learnt what they would give."
    ),
)
