"""RAFT: which responses are kept, and a stage that survives a kill."""

from __future__ import annotations

import math

import torch

from temperament.methods.rollout.raft import keep
from tests.resuming import killed_and_resumed, recipe, same_to_the_bit

SEED = int(torch.seed() % 10**6)


def test_local_ranking_is_blind_to_shifts_of_a_prompt_and_global_is_not():
    g = torch.Generator().manual_seed(SEED)
    k, prompts = 5, 40
    value = torch.rand(prompts * k, generator=g)
    moved = value + torch.rand(prompts, generator=g).repeat_interleave(k) * 10
    local = keep(value, k, "local")
    assert local == keep(moved, k, "local") == [i * k + int(v.argmax()) for i, v in enumerate(value.view(-1, k))]
    best = keep(value, k, "global")
    assert len(best) == prompts and best != keep(moved, k, "global")
    assert min(value[best]) >= max(v for i, v in enumerate(value.tolist()) if i not in set(best))
    assert keep(value, 1, "local") == list(range(len(value)))


def test_the_best_of_k_has_the_density_k_times_f_to_the_k_minus_1():
    """On a world of five responses: sum over what the others may be, against samples; and the bound of its divergence."""
    g = torch.Generator().manual_seed(SEED)
    p, k = torch.rand(5, generator=g).softmax(0), 4
    below = torch.cat([torch.zeros(1), p.cumsum(0)])  # rewards in order: response i beats what is before it
    want = below[1:] ** k - below[:-1] ** k
    draws = torch.multinomial(p, 20000 * k, replacement=True, generator=g)
    got = draws[keep(draws.float(), k, "local")]
    share = torch.bincount(got, minlength=5) / len(got)
    assert float((share - want).abs().max()) < 0.02, (share, want, SEED)
    assert float((want * (want / p).log()).sum()) <= math.log(k) - (k - 1) / k + 1e-6


def test_killed_inside_a_stage_it_goes_on_with_the_same_texts(tmp_path):
    source = {"rollout.raft": {"prompts": {"data.lab": {"skills": ["add3"], "rows": 40}}, "rewards": ["rewards.number"], "k": 2,
                               "stage": 12, "epochs": 2, "beta": 0.1, "max_new": 4}}  # fmt: skip
    one = {"name": "raft", "train": {"source": source, "steps": 8, "batch": 6, "save": {"steps": 1}}}
    whole, resumed = killed_and_resumed(recipe(one), tmp_path, kills=[3, 4])
    assert same_to_the_bit(whole, resumed)
    assert whole.json["steps"][0]["steps"] == 8


def test_best_of_k_builds_what_a_later_step_trains_on(tmp_path):
    from temperament.run.tune import tune

    build = {
        "data.best_of_k": {
            "prompts": {"data.lab": {"skills": ["add", "add3"], "rows": 12}},
            "rewards": ["rewards.number"],
            "k": 3,
            "least": 1.0,
            "max_new": 6,
        }
    }
    train = {"source": {"data.file": {"path": "best", "holdout": 0}}, "steps": 2, "batch": 4}
    run = tune(recipe({"name": "best", "build": {"builder": build}}, {"name": "sft", "train": train}), tmp_path / "run")
    made = run.json["steps"][0]
    assert 0 < made["rows"] <= 12 and run.json["steps"][1]["steps"] == 2
