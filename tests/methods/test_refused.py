"""Values under which a part could only do nothing, or the opposite, are refused where the recipe is read."""

import pytest
import torch

from temperament import parts
from temperament.errors import UserError
from temperament.nn.batch import Images

SAMPLED = {"prompts": {"data.lab": {"skills": ["add"]}}, "rewards": ["rewards.exact"]}
PAINTED = {"captions": {"data.captions": {"captions": ["a cat"]}}, "rewards": ["rewards.brightness"]}


@pytest.mark.parametrize(
    "name, options, word",
    [
        ("objectives.preference.dpo", {"beta": 0.0}, "beta"),
        ("objectives.preference.dpo", {"label_smoothing": 0.5}, "label_smoothing"),
        ("objectives.policy.grpo", {"max_new": 0}, "max_new"),
        ("objectives.policy.grpo", {"clip_low": -0.1}, "clip_low"),
        ("objectives.policy.ppo", {"gamma": 1.5}, "gamma"),
        ("objectives.policy.ppo", {"clip": 0.0}, "clip"),
        ("objectives.policy.value", {"epochs": 0}, "epochs"),
        ("objectives.robust.rmt", {"contrast": -1.0}, "negative"),
        ("objectives.consistency.ict", {"huber": 0.0}, "huber"),
        ("rollout.denoising_chain", {**PAINTED, "limit": 0.0}, "limit"),
        ("rollout.episodes", {"task": "insert", "group": 0}, "group"),
        ("adapters.lora", {"alpha": 0.0}, "alpha"),
        ("adapters.lora", {"lr_factor_B": 0.0}, "lr_factor_B"),
        ("adapters.mixlora", {"alpha": 0.0}, "alpha"),
        ("adapters.mixlora", {"balance": -0.1}, "balance"),
        ("adapters.value_head", {"hidden": -1}, "hidden"),
        ("data.best_of_k", {**SAMPLED, "temperature": 0.0}, "temperature"),
        ("data.best_of_k", {**SAMPLED, "weights": [1.0, 2.0]}, "weights"),
        ("data.s3ft", {"rows": SAMPLED["prompts"], "retries": -1}, "retries"),
        ("schedules.constant", {"value": 1.0, "warmup": -1}, "warmup"),
        ("schedules.linear", {"start": 1.0, "warmup": -1}, "warmup"),
        ("schedules.cosine", {"peak": 1.0, "warmup": -1}, "warmup"),
        ("schedules.wsd", {"peak": 1.0, "warmup": -1}, "warmup"),
        ("schedules.steps", {"values": [], "by": "round"}, "values"),
        ("decode.conjugate_prompt", {"rewrite": [["(a)", r"\2"]]}, "rewrite"),
        ("merge.lines", {"of": "merge.soup_greedy"}, "soup_greedy is not; shape its result"),
        ("evaluate.rewarded", {"reward": "rewards.brightness", "captions": []}, "captions"),
    ],
)
def test_it_is_refused(name, options, word):
    with pytest.raises(UserError, match=word):
        parts.build({name: options})


def test_a_divergence_of_words_refuses_pictures():
    pictures = Images(torch.zeros(2, 3, 4, 4), torch.arange(2))
    with pytest.raises(UserError, match="words"):
        parts.build("regularizers.kl").counts(pictures)


def test_the_edges_are_not():
    parts.build({"objectives.preference.dpo": {"label_smoothing": 0.49}})
    parts.build({"data.best_of_k": {**SAMPLED, "k": 1, "temperature": 0.0}})
    parts.build({"data.s3ft": {"rows": SAMPLED["prompts"], "retries": 0, "temperature": 0.0}})
    parts.build({"decode.conjugate_prompt": {"rewrite": [["(a)", r"\1 again"]]}})
