"""ReFT as a recipe: warm-up, then PPO with a critic; checked, killed and resumed to the bit."""

from __future__ import annotations

import pytest

from temperament.run.recipe import read
from tests.resuming import killed_and_resumed, recipe, same_to_the_bit

LAB = {"data.lab": {"skills": ["add3"], "rows": 12}}


@pytest.mark.parametrize("trainable", ["select.full", {"adapters.lora": {"rank": 2}}], ids=["full", "lora"])
def test_killed_in_the_middle_of_ppo(tmp_path, trainable):
    source = {"rollout.sample": {"prompts": LAB, "rewards": [{"rewards.number": {"partial": 0.1}}], "group": 2, "max_new": 4}}
    critic = {
        "objective": {"Rollout": "objectives.policy.value"},
        "trainable": [{"adapters.lora": {"rank": 2}}, "adapters.value_head"],
    }
    ppo = {
        "source": source,
        "trainable": trainable,
        "objective": "objectives.policy.ppo",
        "players": {"critic": critic},
        "steps": 4,
        "batch": 4,
        "optimizer": {"optim.adamw": {"lr": 1e-4}},
        "save": {"steps": 1},
    }
    warm = {"source": LAB, "trainable": trainable, "steps": 2, "batch": 4, "save": {"steps": 1}}
    document = recipe(
        {"name": "warm", "train": warm, "ledger": False}, {"name": "ppo", "train": ppo}, check=trainable == "select.full"
    )
    whole, resumed = killed_and_resumed(document, tmp_path, kills=[4, 2])
    assert same_to_the_bit(whole, resumed)
    if document["check"]:
        laws = [law for step in whole.json["check"]["steps"] for law in step["laws"]]
        assert len(laws) > 20 and all(law["ok"] for law in laws)


def test_the_preset_is_a_recipe():
    assert read("recipes/reft.yaml").steps[1].train.players["critic"].on == "policy"
