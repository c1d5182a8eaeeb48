"""[269] ResiP: a small residual policy, taught by PPO to correct a frozen one at every step, masters what cloning cannot.

Task: the peg and the narrow slot, at which the lab policy - cloned from noisy demonstrations, carrying out its plans blindly
- succeeds in 45 %. Arms, with as many episodes each: PPO on the residual; PPO on the policy itself, whose decisions are its
plans; and further cloning of four hundred new demonstrations. Each at its own best rate, over the better of the two
baselines. Compared: success from held-out starts."""

from temperament.run.claims import Claim

RATES = {"residual": [2e-3, 4e-3, 8e-3], "policy": [3e-4, 1e-3, 3e-3], "cloning": [1e-4, 1e-3]}
EPISODES, STEPS = 128, 60
PPO = {"objectives.policy.ppo": {"beta": 0.0, "gamma": 0.99, "lam": 0.95, "epochs": 8, "minibatches": 4, "whiten": True}}
CRITIC = {
    "objective": {"Rollout": {"objectives.policy.value": {"epochs": 16, "clip": None}}},
    "trainable": [{"adapters.value_head": {"hidden": 64}}],
    "optimizer": {"optim.adamw": {"lr": 1e-3}},
}
EVALUATION = {"items": 400, "keep": False, "suites": [{"evaluate.control": {"target": "insert"}}]}


def recipe(arm: str, rate: float) -> dict:
    train = {"optimizer": {"optim.adamw": {"lr": rate}}, "batch": EPISODES, "micro": EPISODES, "steps": STEPS}
    if arm == "cloning":
        demonstrations = {"data.demonstrations": {"task": "insert", "episodes": 400}}
        train |= {"source": demonstrations, "objective": "objectives.sft.behaviour_cloning", "steps": 8 * STEPS}
    else:
        explore = {"residual": "step", "policy": "plan"}[arm]
        train |= {
            "source": {"rollout.episodes": {"task": "insert", "explore": explore}},
            "objective": PPO,
            "players": {"critic": CRITIC},
        }
        if arm == "residual":
            train["trainable"] = {"adapters.residual_policy": {"scale": 0.5, "log_std": -1.0}}
    return {"base": "lab/policy", "steps": [{"name": arm, "train": train}], "evaluation": EVALUATION}


def run(seed, lab):
    numbers = {arm: lab.best(arm, lambda rate, arm=arm: recipe(arm, rate), RATES[arm], seed) for arm in RATES}
    better = max(("policy", "cloning"), key=lambda arm: numbers[arm]["target"])
    others = {f"{arm}_{k}": numbers[arm][k] for arm in ("policy", "cloning") for k in ("target", "retained")}
    return {"method": numbers["residual"], "baseline": numbers[better] | others}


claim = Claim(
    paper="269",
    title="From Imitation to Refinement: Residual RL for Precise Assembly (ResiP)",
    says="Residual reinforcement on a frozen cloned policy raises its success above what fine-tuning the policy reaches.",
    parts=("adapters.residual_policy", "rollout.episodes", "objectives.policy.ppo", "objectives.policy.value"),
    measure="target",
    better="higher",
    baseline="the better of PPO on the policy itself (equal episodes) and cloning 400 more demonstrations, each at its "
    "best rate",
    seeds=(0, 1, 2, 3, 4),
    run=run,
)
