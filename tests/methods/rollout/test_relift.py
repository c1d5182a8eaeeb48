"""ReLIFT: what is hard, two optimizers on one set of weights, and a buffer that survives a kill."""

from __future__ import annotations

import torch

from temperament.methods.objectives.policy.grpo import GRPO
from temperament.methods.objectives.sft.cross_entropy import CrossEntropy
from temperament.methods.optim.adamw import AdamW
from temperament.methods.rollout.relift import ReLIFT, Stream, hard
from temperament.methods.select.full import Full
from temperament.nn.batch import Rollout
from temperament.nn.logprobs import label, score
from temperament.run.recipe import PlayerSpec, read
from temperament.run.training import build_players, owners
from temperament.train.loop import train
from tests.resuming import killed_and_resumed, recipe, same_to_the_bit
from tests.train.rows import base_of, context, spec, tokens

SEED = int(torch.seed() % 10**6)


def test_hard_is_what_failed_every_time_in_a_proper_format():
    table = {4: [0, 0], 7: [-1, -1], 2: [0, 1], 9: [0, -1], 5: [0, 0]}
    rewards = torch.tensor([r for rs in table.values() for r in rs], dtype=torch.float)
    group = torch.tensor([g for g in table for _ in range(2)])
    rows = tokens(len(rewards), SEED)
    assert hard(Rollout(rows, torch.zeros_like(rows.weights), rewards, group), 0.0) == [5, 4]


def test_a_question_that_came_twice_in_a_step_is_one():
    """Its second group has a number beyond the questions."""
    rows = tokens(6, SEED)
    group, failed = torch.tensor([1, 1, 4, 4, 0, 0]), torch.zeros(6)  # of three questions: 1, 1 again, 0
    stream = object.__new__(Stream)
    stream.spec, stream.buffer, stream.shown, stream.answers = ReLIFT("", "", due=9), [], 0, [None] * 3
    stream.inner = type("Inner", (), {"batch": lambda *a: Rollout(rows, torch.zeros_like(rows.weights), failed, group)})()
    assert len(stream.batch(0)) == 1 and stream.buffer == [0, 1]


def make(lr: float):
    teach = {"teach": PlayerSpec({"Tokens": CrossEntropy()}, AdamW(3e-3))}
    ctx = context(base_of("llama_tied"))
    return build_players(spec(trainable=[Full()], objective=GRPO(), optimizer=AdamW(lr), players=teach), ctx)


def test_two_optimizers_on_one_set_of_weights_keep_their_own_moments():
    """Rewards all equal: the rollout teaches nothing, and the update is SFT's on the demonstrations, to the bit."""
    both = make(1e-3)
    alone = build_players(spec(trainable=[Full()], optimizer=AdamW(3e-3)), context(base_of("llama_tied")))
    assert owners(both) == ["policy"] and both[0].live is both[1].live and both[0].stepper is not both[1].stepper

    class Source:
        def __init__(self, live, with_rollout):
            self.live, self.with_rollout = live, with_rollout

        def batch(self, step, progress):
            shown = [tokens(4, SEED + step)]
            if not self.with_rollout:
                return shown
            one = tokens(4, SEED + 50 + step)
            with torch.no_grad():
                behaviour = score(self.live.model, one, label())["label"]
            return [Rollout(one, behaviour, torch.zeros(4), torch.tensor([0, 0, 1, 1])), *shown]

    rows = []
    train(both, Source(both[0].live, True), 3, micro=2, record=rows.append)
    train(alone, Source(alone[0].live, False), 3, micro=2)
    for name, p in both[0].live.params.items():
        assert torch.equal(p.tensor, alone[0].live.params[name].tensor), (name, SEED)
    assert all(row["policy/grad_norm"] == 0 and row["teach/grad_norm"] > 0 for row in rows)
    for p in (*both, *alone):
        p.live.close()


def test_killed_with_a_buffer_it_goes_on_to_the_same_bits(tmp_path):
    rows = {"data.lab": {"skills": ["shift", "add"], "rows": 24}}
    sample = {"rollout.sample": {"prompts": rows, "rewards": ["rewards.exact"], "group": 2, "max_new": 4}}
    source = {"rollout.relift": {"rollout": sample, "demonstrations": rows, "due": 5}}
    step = {"source": source, "objective": "objectives.policy.grpo", "steps": 7, "batch": 8, "save": {"steps": 1},
            "optimizer": {"optim.adamw": {"lr": 1e-5}},
            "players": {"teach": {"objective": {"Tokens": "objectives.sft.cross_entropy"}}}}  # fmt: skip
    whole, resumed = killed_and_resumed(recipe({"name": "relift", "train": step}), tmp_path, kills=[3, 3])
    assert same_to_the_bit(whole, resumed)
    import json

    log = [json.loads(line) for line in (whole.folder / "log.jsonl").read_text().splitlines()]
    assert log[-1]["demonstrations"] >= 5 and any(row["buffer"] for row in log)
    assert any("teach/lr" in row for row in log) and any("teach/lr" not in row for row in log)


def test_the_preset_is_a_recipe():
    assert not read("recipes/relift.yaml").steps[0].train.players["teach"].trainable
