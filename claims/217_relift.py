"""[217] ReLIFT: reinforcement alone never solves what no sample solves; supervision on just those questions does, and needs few
demonstrations.

Task: the new procedure `shift`, which the lab base never answers rightly (hard), beside sums it knows (easy). Arms: ReLIFT;
reinforcement alone. Compared: held-out accuracy on the hard task. Beside it: how many demonstrations ReLIFT took, and the easy
task. (A first run of 40 steps, 8 questions each, showed 157 demonstrations, too few for either arm to solve one: 0 against 0.)
"""

import json

from temperament.run.claims import Claim

ROWS = {"data.lab": {"skills": ["shift", "add"], "rows": 600}}
STEPS = 160
SUITE = {"evaluate.lab": {"target": "shift", "retained": ["add", "reverse", "people"]}}


def recipe(due: int, rate: float, rl: float = 3e-5) -> dict:
    sample = {"rollout.sample": {"prompts": ROWS, "rewards": ["rewards.lab"], "group": 4, "max_new": 16}}
    train = {
        "source": {"rollout.relift": {"rollout": sample, "demonstrations": ROWS, "due": due}},
        "objective": {"objectives.policy.grpo": {"scale": False, "per": "constant", "max_new": 16}},
        "optimizer": {"optim.adamw": {"lr": rl}},
        "batch": 64,
        "micro": 64,
        "steps": STEPS,
        "players": {
            "teach": {"objective": {"Tokens": "objectives.sft.cross_entropy"}, "optimizer": {"optim.adamw": {"lr": rate}}}
        },
    }
    return {
        "base": "lab/lm",
        "steps": [{"name": "relift", "train": train}],
        "evaluation": {"items": 100, "keep": False, "suites": [SUITE]},
    }


def shown(lab, name: str, seed: int) -> int:
    lines = (lab.folder / f"{name}-{seed}" / "log.jsonl").read_text().splitlines()
    return max((json.loads(line).get("demonstrations", 0) for line in lines), default=0)


def run(seed, lab):
    method = lab.best("relift", lambda rate: recipe(16, rate), [6e-4, 1.2e-3], seed)
    baseline = lab.best("rl", lambda rate: recipe(10**6, 3e-4, rate), [3e-5, 1e-4], seed)
    easy = lambda numbers: numbers["skills"]["add"]["after"]
    return {
        "method": method | {"easy": easy(method), "demonstrations": shown(lab, "relift", seed)},
        "baseline": baseline | {"easy": easy(baseline)},
    }


claim = Claim(
    paper="217",
    title="Learning What Reinforcement Learning Can't: Interleaved Online Fine-Tuning for Hardest Questions",
    says="Supervision interleaved on the questions all samples fail solves what reinforcement alone cannot, with few "
    "demonstrations.",
    parts=("rollout.relift", "objectives.policy.grpo"),
    measure="target",
    better="higher",
    baseline="the same run with a buffer that never fills: reinforcement alone",
    within=(("easy", 0.1),),
    seeds=(0, 1, 2),
    run=run,
    note="`demonstrations`: how often a question was shown with its answer",
)
