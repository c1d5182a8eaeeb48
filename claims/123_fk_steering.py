"""[123] FK steering: particles that are weighed on the way reach a reward that best-of-k, with as many calls, does not.

The lab generator paints captions that leave place and background open; the reward is a mean colour. Compared: the reward of
four particles steered by the potential max, against the best of four pictures at the end: the same calls of the network. The
base is one picture of as many steps. Particles are weighed between half and two thirds of the steps: before, the reward of
an estimate says nothing of the picture's (correlation 0.2), after, all is decided (0.9). How often a picture still shows what
was asked is recorded. (Weighed from the first step on, seeds 0 to 2 gave -0.004, 95 % interval -0.011 to 0.003; the window was
seen on seed 0, so the claim is run on others.)
"""

from temperament.run.claims import Claim

SAID = [f"a {colour} {shape}" for colour in ("red", "blue", "white") for shape in ("cross", "disc", "triangle", "bar")]
COLOUR = {"rewards.colour": {"target": [0.5, 0.3, 0.3]}}
SAMPLER = {"sample.sampler": {"steps": 20, "eta": 1.0}}
WHEN = {"times": 3, "first": 0.5, "last": 0.65}
STRENGTH = 100.0  # pictures of one caption differ by a few hundredths of this reward


def system(*parts):
    painted = {"evaluate.rewarded": {"reward": COLOUR, "captions": SAID}}
    suites = [painted, {"evaluate.renders": {"shapes": ["cross"], "items": 16}}]
    return {"base": "lab/unet", "inference": [SAMPLER, *parts], "evaluation": {"items": 36, "keep": False, "suites": suites}}


def run(seed, lab):
    steer = lambda **how: {"sample.fk_steering": {"reward": COLOUR, "particles": 4, "strength": STRENGTH, **WHEN, **how}}
    arms = {"method": system(steer(potential="max")), "baseline": system(steer(times=0)), "plain": system()}
    got = {name: lab.tune(name, recipe, seed)["skills"] for name, recipe in arms.items()}
    numbers = {name: {"reward": s["reward"]["after"], "asked": s["cross"]["after"]} for name, s in got.items()}
    return {side: numbers[side] | {"base": numbers["plain"]["reward"]} for side in ("method", "baseline")}


claim = Claim(
    paper="123",
    title="A General Framework for Inference-time Scaling and Steering of Diffusion Models",
    says="With equal calls of the network, particles steered on the way reach a higher reward than the best chosen at the end.",
    parts=("sample.fk_steering", "rewards.colour"),
    measure="reward",
    better="higher",
    baseline="the best of four pictures",
    seeds=(10, 11, 12),
    run=run,
    note="`base`: one picture as it comes; `asked`: share of crosses painted in the shape, colour and place of their captions",
)
