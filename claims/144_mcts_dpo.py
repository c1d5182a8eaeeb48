"""[144] MCTS-DPO: preferences between single steps, found by tree search, teach more than preferences between whole answers.

Task: sums told as a story, answered in steps; the lab base early in its training gets half of them right. Both arms sample from
the policy as it stands for the same questions, about as many tokens in all, judge by the last number, and learn by DPO, each at
its own best rate: from pairs of sibling steps of a tree, or from the best and the worst of whole answers (a tree of depth 1).
Compared: held-out accuracy.
"""

import json

from temperament.run.claims import Claim

ROWS = {"data.lab": {"skills": ["story"], "rows": 400}}
RATES = [3e-5, 1e-4]
SUITE = {"evaluate.lab": {"target": "story", "retained": ["multiply", "sort"]}}
TREES = {
    "steps": {"actions": 4, "root_actions": 4, "depth": 4, "iterations": 3, "first": 2},
    "answers": {"actions": 8, "root_actions": 8, "depth": 1, "iterations": 64, "first": 1},  # all 8 are visited
}

UPDATES = {"steps": 40, "answers": 28}  # so that both draw about as many tokens; trees give more pairs for them


def recipe(arm: str, rate: float) -> dict:
    search = {"prompts": ROWS, "rewards": ["rewards.number"], "separator": ";", "stage": 64, "step_tokens": 16, "max_new": 48}
    train = {
        "source": {"rollout.mcts_steps": search | TREES[arm]},
        "objective": {"objectives.preference.dpo": {"beta": 0.1}},
        "optimizer": {"optim.adamw": {"lr": {"schedules.constant": {"value": rate, "warmup": 3}}}},
        "batch": 16,
        "micro": 16,
        "steps": UPDATES[arm],
    }
    evaluation = {"items": 300, "keep": False, "suites": [SUITE]}
    return {"base": "lab/lm@early", "steps": [{"name": arm, "train": train}], "evaluation": evaluation}


def sampled(lab, arm: str, seed: int) -> int:
    """Tokens the searches of a run drew."""
    rows = [json.loads(line) for line in (lab.folder / f"{arm}-{seed}" / "log.jsonl").read_text().splitlines()]
    drawn = [r["tree_tokens"] for r in rows if "tree_tokens" in r]
    return sum(b for a, b in zip([None, *drawn], drawn, strict=False) if a != b)


def run(seed, lab):
    best = lambda arm: lab.best(arm, lambda rate: recipe(arm, rate), RATES, seed)
    numbers = {arm: best(arm) | {"sampled": sampled(lab, arm, seed)} for arm in TREES}
    return {"method": numbers["steps"], "baseline": numbers["answers"]}


claim = Claim(
    paper="144",
    title="Monte Carlo Tree Search Boosts Reasoning via Iterative Preference Learning",
    says="Step-level preferences from a tree search of the current policy raise accuracy more than those of whole answers.",
    parts=("rollout.mcts_steps", "objectives.preference.dpo"),
    measure="target",
    better="higher",
    baseline="DPO on the best and worst of whole answers to the same questions, as many sampled tokens, its own best rate",
    seeds=(0, 1, 2),
    run=run,
    why=(
        "Both gain nine points in so few updates, and differ by a third of a point: the stories are three short steps, so a "
        "whole answer says nearly as well which step was wrong."
    ),
    note="`sampled`: tokens each arm drew; a tree gives more pairs for them, so it takes 40 updates and the baseline 28",
)
