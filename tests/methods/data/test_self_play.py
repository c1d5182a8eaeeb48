"""Self-play: the pairs of a round are the given answers against those of the model the round began with."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from temperament.methods.objectives.preference.dpo import DPO
from temperament.methods.select.full import Full
from temperament.nn.batch import Pairs
from temperament.nn.logprobs import response
from temperament.run import laws
from temperament.run.training import build_players
from tests.resuming import killed_and_resumed, recipe, same_to_the_bit
from tests.train.rows import base_of, context, spec, tokens

SEED = int(torch.seed() % 10**6)


def test_at_the_opponent_the_loss_is_log_2_and_the_gradient_half_beta_times_the_difference():
    (player,) = build_players(spec(trainable=[Full()], objective=DPO(beta=0.7)), context(base_of("llama_tied")))
    pairs = Pairs(tokens(4, SEED), tokens(4, SEED + 1))
    got, loss = laws.gradient(player, player.objectives["Pairs"], pairs, 2)
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    model = player.live.model
    (-0.7 / 2 * (response(model, pairs.chosen) - response(model, pairs.rejected)).mean()).backward()
    assert laws.distance(laws._taken(player), got)[0] < 1e-5
    same, _ = laws.gradient(player, player.objectives["Pairs"], replace(pairs, rejected=pairs.chosen), 2)
    assert laws.norm(same) < 1e-5 * laws.norm(got)  # an own answer equal to the given one teaches nothing
    player.live.close()


def spin(times: int = 3) -> dict:
    build = {
        "data.self_play": {"rows": {"data.lab": {"skills": ["add3"], "rows": 30}}, "take": 8, "max_new": 6, "temperature": 1.5}
    }
    play = {
        "source": {"data.file": {"path": "pairs", "holdout": 0}},
        "objective": "objectives.preference.dpo",
        "steps": 3,
        "batch": 4,
        "optimizer": {"optim.adamw": {"lr": 1e-4}},
        "save": {"steps": 1},
    }
    inner = [{"name": "pairs", "build": {"builder": build}}, {"name": "play", "train": play, "ledger": False}]
    return recipe({"name": "spin", "rounds": {"times": times, "steps": inner}})


def test_rounds_mix_the_round_before_and_survive_kills_to_the_bit(tmp_path):
    whole, resumed = killed_and_resumed(spin(), tmp_path, kills=[2, 4, 1])
    assert same_to_the_bit(whole, resumed)
    read = lambda run, k: [
        json.loads(x) for x in (run.folder / "steps" / f"spin.{k}.pairs" / "data.jsonl").read_text().splitlines()
    ]
    rounds = [read(whole, k) for k in (1, 2, 3)]
    assert rounds == [read(resumed, k) for k in (1, 2, 3)]
    for k, rows in enumerate(rounds):
        new = [r for r in rows if r["round"] == k]
        old = [r for r in rows if r["round"] != k]
        assert new and old == ([r for r in rounds[k - 1] if r["round"] == k - 1] if k else [])
        assert all(r["chosen"] != r["rejected"] for r in rows)
    assert [s["name"] for s in whole.json["steps"]] == [f"spin/{k}/{n}" for k in (1, 2, 3) for n in ("pairs", "play")]
