"""[010] RLCM: reinforcement on the few steps of a consistency model raises a reward faster than on a diffusion model's many.

Task: bright pictures of nine captions, the reward being how near a picture's mean luminance is to white. Method: PPO
without a critic on four steps of lab/consistency, each noised anew, advantages by caption. Baseline: the same on twenty
ancestral steps of lab/unet (DDPO), with as many calls of the network in training - so nearly equal time - sampled with its
own twenty steps. Each at its own best rate. Compared: the reward reached, on noise that was not trained on; the second base is
where the first one comes from, so both begin at the same pictures."""

from temperament.run.claims import Claim

SCENES = [
    ("red disc", "top left", "black"),
    ("green cross", "top right", "grey"),
    ("blue bar", "bottom left", "navy"),
    ("yellow frame", "bottom right", "brown"),
    ("magenta saltire", "top left", "grey"),
    ("white triangle", "top right", "black"),
    ("red bar", "bottom right", "navy"),
    ("green disc", "bottom left", "brown"),
    ("blue frame", "top left", "grey"),
]
CAPTIONS = [f"a {subject} at the {place} on {ground}" for subject, place, ground in SCENES]
RATES = {"rlcm": [1e-3, 3.3e-3], "ddpo": [3.3e-3, 1.1e-2]}
ARMS = {"rlcm": ("lab/consistency", 4, 1.0, 60), "ddpo": ("lab/unet", 20, 1.0, 12)}  # base, steps of a chain, guidance, updates
REWARD = {"rewards.brightness": {}}


def recipe(arm: str, rate: float) -> dict:
    base, steps, guidance, updates = ARMS[arm]
    source = {
        "captions": {"data.captions": {"captions": CAPTIONS}},
        "rewards": [REWARD],
        "group": 8,
        "steps": steps,
        "guidance": guidance,
        "least": 8,
    }
    train = {
        "source": {"rollout.denoising_chain": source},
        "objective": {"objectives.policy.ppo": {"critic": None, "gamma": 1.0, "beta": 0.0, "clip": 1e-4, "epochs": 1}},
        "trainable": {"adapters.lora": {"rank": 8, "targets": ["denoiser/.*"]}},
        "optimizer": {"optim.adamw": {"lr": rate}},
        "batch": 32,
        "micro": 32,
        "steps": updates,
    }
    suites = [{"evaluate.rewarded": {"reward": REWARD, "captions": CAPTIONS}}, {"evaluate.renders": {"items": 15}}]
    return {
        "base": base,
        "steps": [{"name": arm, "train": train}],
        "inference": [{"sample.sampler": {"steps": steps, "guidance": guidance, "eta": 1.0}}],
        "evaluation": {"items": 45, "keep": False, "diagnose": [], "suites": suites},
    }


def run(seed, lab):
    found = {arm: lab.best(arm, lambda rate, arm=arm: recipe(arm, rate), RATES[arm], seed) for arm in ARMS}
    numbers = lambda arm: {"reward": found[arm]["target"], **{k: found[arm][k] for k in ("retained", "seconds", "rate")}}
    return {"method": numbers("rlcm"), "baseline": numbers("ddpo")}


claim = Claim(
    paper="010",
    title="RL for Consistency Models: Faster Reward Guided Text-to-Image Generation (RLCM)",
    says="In equal time, PPO on a consistency model raises a reward more than PPO on a diffusion model of twenty steps.",
    parts=("rollout.denoising_chain", "objectives.policy.ppo", "rewards.brightness"),
    measure="reward",
    better="higher",
    baseline="the same on twenty ancestral steps of the diffusion model, as many calls of the network, at its own best rate",
    seeds=(0, 1, 2),
    note="`retained`: share of pictures, of captions not trained on, that show what was asked; 0 where all reward was won.",
    run=run,
)
