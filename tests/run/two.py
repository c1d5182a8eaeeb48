"""One recipe of each family, carried out on as many processes as this is launched with; what `test_two.py` compares.

python -m torch.distributed.run --nproc_per_node=2 -m tests.run.two OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from temperament.run.tune import tune

ADD = {"data.lab": {"skills": ["add3"], "rows": 16}}
ADAMW = {"optim.adamw": {"lr": 1e-4}}


def step(name: str, **train: Any) -> dict[str, Any]:
    return {
        "name": name,
        "ledger": False,
        "train": {"source": ADD, "optimizer": ADAMW, "batch": 5, "micro": 2, "steps": 3, **train},
    }


def sampled(group: int = 2) -> dict[str, Any]:
    return {"prompts": ADD, "rewards": [{"rewards.number": {"partial": 0.1}}], "group": group, "max_new": 4}


def rounds() -> list[dict[str, Any]]:
    build = {"data.self_play": {"rows": ADD, "take": 6, "max_new": 5, "temperature": 1.5}}
    play = step("play", source={"data.file": {"path": "pairs", "holdout": 0}}, objective="objectives.preference.dpo")
    inner = [{"name": "pairs", "build": {"builder": build}}, play]
    return [{"name": "spin", "rounds": {"times": 2, "steps": inner}}]


TREE = {"prompts": {"data.lab": {"skills": ["story"], "rows": 8}}, "rewards": ["rewards.number"], "separator": ";",
        "stage": 4, "actions": 2, "root_actions": 3, "depth": 2, "iterations": 1, "first": 2,
        "greedy": False, "step_tokens": 8}  # fmt: skip
CRITIC = {"objective": {"Rollout": "objectives.policy.value"},
          "trainable": [{"adapters.lora": {"rank": 2}}, "adapters.value_head"]}  # fmt: skip
TEACH = {"objective": {"Tokens": "objectives.sft.cross_entropy"}}
EXPLORE = {"rollout.episodes": {"task": "insert"}}
PLAYED = {
    "objective": {"Rollout": {"objectives.policy.value": {"epochs": 2}}},
    "trainable": [{"adapters.value_head": {"hidden": 8}}],
}
FIGURES = {"data.sprites": {"figures": 3, "rows": 12}}
SEE = {"source": FIGURES, "objective": "objectives.classify.cross_entropy"}
NEW = {"adapters.class_head": {"of": FIGURES}}
MASKED = {"source": FIGURES, "objective": {"objectives.classify.noise_mask": {"kernel": 3, "sigma": 1.0}}}
MASKER = {"objective": {"Images": "objectives.policy.noise_mask"}, "on": "start",
          "trainable": ["select.full", {"adapters.mask_policy": {"grid": 2}}], "optimizer": ADAMW}  # fmt: skip
SUBJECT = {"data.prior_preservation": {"of": {"data.sprite_subject": {"sprite": 0}}, "noun": "cross", "count": 3,
                                       "sampler": {"sample.sampler": {"steps": 2, "eta": 1.0}}}}  # fmt: skip
CHAIN = {"captions": {"data.captions": {"captions": ["a red disc on black", "a blue bar on navy"]}},
         "rewards": ["rewards.brightness"], "group": 3, "steps": 2, "least": 2}  # fmt: skip
LORA = {"adapters.lora": {"rank": 2, "targets": ["attention"]}}

FAMILIES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "masks that move": ("lab/lm-small", [step("lift", trainable={"select.lift": {"rank": 4, "share": 0.1, "refresh": 2}})]),
    "routed experts": ("lab/lm-small", [step("mixlora", trainable={"adapters.mixlora": {"rank": 2}})]),
    "rounds": ("lab/lm-small", rounds()),
    "two kinds of batch": ("lab/lm-small", [step(
        "relift", source={"rollout.relift": {"rollout": {"rollout.sample": sampled()}, "demonstrations": ADD, "due": 3}},
        objective="objectives.policy.grpo", players={"teach": TEACH}, batch=6)]),
    "search": ("lab/lm-small", [step("mcts", source={"rollout.mcts_steps": TREE}, objective="objectives.preference.dpo")]),
    "actor and critic": ("lab/lm-small", [step(
        "ppo", source={"rollout.sample": sampled()}, objective="objectives.policy.ppo", players={"critic": CRITIC}, batch=6)]),
    "a policy": ("lab/policy", [step(
        "residual", source=EXPLORE, objective={"objectives.policy.ppo": {"beta": 0.01, "epochs": 2, "minibatches": 2}},
        trainable={"adapters.residual_policy": {"width": 8, "scale": 0.5}}, players={"critic": PLAYED}, batch=8)]),
    "a pyramid beside": ("lab/vit", [step("hst", **SEE, trainable={"adapters.side.hst": {"of": FIGURES}})]),
    "a bank of features": ("lab/cnn", [step(
        "tune", **SEE, regularizers=[{"regularizers.dr_tune": {"bank": 6}}], trainable=["select.full", NEW])]),
    "two players on pictures": ("lab/cnn", [step(
        "heat", **MASKED, trainable=["select.full", NEW], players={"masker": MASKER})]),
    "a subject": ("lab/unet", [step("dream", source=SUBJECT, objective="objectives.diffusion.denoise", trainable=LORA)]),
    "a chain of pictures": ("lab/consistency", [step(
        "rlcm", source={"rollout.denoising_chain": CHAIN}, trainable=LORA, batch=6,
        objective={"objectives.policy.ppo": {"critic": None, "gamma": 1.0, "beta": 0.0, "clip": 1e-4, "epochs": 1}})]),
}  # fmt: skip


def carried_out(out: Path) -> dict[str, list[dict[str, float]]]:
    """The log of each: loss and gradient norms of every step."""
    logs = {}
    for name, (base, steps) in FAMILIES.items():
        document = {"base": base, "check": False, "steps": steps,
                    "evaluation": {"items": 1, "keep": False, "base": False, "diagnose": []}}  # fmt: skip
        folder = out / name.replace(" ", "-")
        tune(document, folder)
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        logs[name] = [{k: v for k, v in r.items() if k.endswith(("loss", "grad_norm"))} for r in rows if "loss" in r]
    return logs


if __name__ == "__main__":
    torch.set_num_threads(1)
    carried_out(Path(sys.argv[1]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
