"""[016] LoFiT: offsets on the heads that a first step found teach more than the same offsets on random heads.

A new procedure, from the same base. Step one trains factors on all heads, with L1; step two, again from the base, trains
offsets on the quarter of the heads that scored highest. The control skips step one and draws as many heads. Both have the same
steps in the second, each at its own best rate. Compared: nats per token of the right answers of held-out items (graded: so few
numbers teach only part of a procedure).
"""

from temperament.run.claims import Claim

RATES = [1e-2, 3e-2]
L1 = {"regularizers.l1": {"of": "new", "per_entry": False, "weight": 5e-4}}


def train(trainable, rate: float, steps: int, **more) -> dict:
    return {
        "source": {"data.lab": {"skills": ["shift"], "rows": 2000}},
        "trainable": trainable,
        "optimizer": {"optim.adamw": {"lr": {"schedules.constant": {"value": rate, "warmup": 10}}}},
        "batch": 16,
        "steps": steps,
        **more,
    }


def recipe(found: bool, rate: float, steps: int = 200, items: int = 100) -> dict:
    offsets = {"adapters.head_offset": {"of": "find", "share": 0.25} if found else {"by": "random", "share": 0.25}}
    first = {"name": "find", "ledger": False, "train": train("adapters.head_scale", 5e-3, steps, regularizers=[L1])}
    second = {"name": "tune", "start": "base", "train": train(offsets, rate, steps)}
    suites = [{"evaluate.lab": {"target": "shift"}}]
    return {"base": "lab/lm", "check": False, "steps": [first, second] if found else [second],
            "evaluation": {"items": items, "suites": suites, "diagnose": []}}  # fmt: skip


def run(seed, lab):
    clearest = lambda numbers: -numbers["target_nll"]
    one = lambda name, found: lab.best(name, lambda rate: recipe(found, rate), RATES, seed, clearest)
    return {"method": one("found", True), "baseline": one("random", False)}


claim = Claim(
    paper="016",
    title="LoFiT: Localized Fine-tuning on LLM Representations",
    says="Offsets on heads chosen by a first step teach a task better than offsets on as many random heads.",
    parts=("adapters.head_scale", "adapters.head_offset"),
    measure="target_nll",
    better="lower",
    baseline="adapters.head_offset on random heads, the same number and steps, at its own best rate",
    seeds=(0, 1, 2, 3, 4),
    run=run,
    why=(
        "198 numbers teach this base nothing of a new procedure (0 % either way), wherever they stand, even at rates that cost "
        "nearly all it knew; the chosen heads are 0.02 nats nearer, which the interval does not tell from nothing."
    ),
)
