"""[039] RLG: how much of a reward's tuning a sampler follows is a dial without training, and goes beyond what was trained.

The lab generator is tuned by LoRA towards bright pictures (rewards back through the sampler), and stopped early. Compared: the
reward at weight 1.5 of the guidance against the tuned model itself (weight 1). Recorded: the reward at 0, 0.5 and 2, whether
it grows all along, and how often captions are still painted as asked. (Towards a mean colour, a reward with its best inside of
what can be painted, the tuned model was there already at 0.93: weight 1.5 gave -0.003, 95 % interval -0.020 to 0.014.)
"""

from itertools import pairwise

from temperament.run.claims import Claim

SAID = [f"a {colour} {shape}" for colour in ("red", "blue", "white") for shape in ("cross", "disc", "triangle", "bar")]
BRIGHT = "rewards.brightness"
SAMPLER = {"sample.sampler": {"steps": 10}}
WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0)


def evaluation():
    painted = {"evaluate.rewarded": {"reward": BRIGHT, "captions": SAID}}
    return {"items": 36, "keep": False, "suites": [painted, {"evaluate.renders": {"shapes": ["disc"], "items": 16}}]}


def tuned():
    train = {
        "source": {"data.captions": {"captions": SAID}},
        "objective": {"objectives.diffusion.reward_backprop": {"rewards": [BRIGHT], "steps": 10, "most": 5}},
        "trainable": {"adapters.lora": {"rank": 8, "targets": ["attention"]}},
        "optimizer": {"optim.adamw": {"lr": 1e-3}},
        "batch": 8,
        "steps": 20,
    }
    return {"base": "lab/unet", "steps": [{"name": "rl", "train": train}], "inference": [SAMPLER], "evaluation": evaluation()}


def run(seed, lab):
    lab.tune("tuned", tuned(), seed)
    merge = {"name": "tuned", "merge": {"method": "merge.linear", "of": [str(lab.folder / f"tuned-{seed}")]}}
    reward, asked = {}, {}
    for w in WEIGHTS:
        system = {"base": "lab/unet", "steps": [merge], "inference": [SAMPLER, {"sample.rl_guidance": {"weight": w}}]}
        got = lab.tune(f"at-{w:g}", system | {"evaluation": evaluation()}, seed)["skills"]
        reward[w], asked[w] = got["reward"]["after"], got["disc"]["after"]
    grows = float(all(reward[a] < reward[b] for a, b in pairwise(WEIGHTS)))
    at = {f"at {w:g}": reward[w] for w in (0.0, 0.5, 2.0)}
    method = {"reward": reward[1.5], "asked": asked[1.5], "grows": grows, **at}
    return {"method": method, "baseline": {"reward": reward[1.0], "asked": asked[1.0]}}


claim = Claim(
    paper="039",
    title="Inference-Time Alignment Control for Diffusion Models with Reinforcement Learning Guidance",
    says="Guiding the tuned model against its base gives more of the reward than tuning did, and a dial for how much.",
    parts=("sample.rl_guidance", "objectives.diffusion.reward_backprop"),
    measure="reward",
    better="higher",
    baseline="the tuned model itself (weight 1)",
    run=run,
    note="`grows`: 1 where the reward grows with every weight from 0 to 2; `asked`: share of discs painted as asked",
)
