"""SCoRe's objective: its formula, turn by turn; one turn is REINFORCE; a first turn without credit moves by the KL alone."""

from __future__ import annotations

import pytest
import torch

from temperament.errors import UserError
from temperament.methods.adapters.lora import LoRA
from temperament.methods.objectives.policy.grpo import GRPO
from temperament.methods.objectives.policy.score import SCoRe
from temperament.methods.select.full import Full
from temperament.nn.batch import Rollout
from temperament.nn.logprobs import label, score
from temperament.protocols import Progress
from temperament.run import laws
from temperament.run.training import build_players
from temperament.train.loop import run_batch
from tests.train.rows import base_of, context, spec, tokens

SEED = int(torch.seed() % 10**6)
G = torch.Generator().manual_seed(SEED)


def policy(objective, trainable=LoRA(rank=3)):
    """A policy away from its start, so that the KL is not zero."""
    player = build_players(spec(trainable=[trainable], objective=objective), context(base_of("llama_tied")))[0]
    with torch.no_grad():
        for p in player.live.params.values():
            p.tensor.add_(0.1 * torch.randn(p.tensor.shape, generator=G))
    return player


def rollout(model, n=8, turns=True) -> Rollout:
    one = tokens(n, SEED)
    with torch.no_grad():
        behaviour = score(model, one, label())["label"]
    turn = torch.arange(n) % 2 if turns else None
    return Rollout(one, behaviour, torch.randn(n, generator=G), torch.arange(n) // 4, turn=turn)


def by_hand(player, batch, credit, beta, reference="base"):
    """The docstring's formula, one row and one token after the other, from the logits."""
    said = lambda: player.live.model(input_ids=batch.tokens.ids, use_cache=False).logits.log_softmax(-1)
    with torch.no_grad(), player.live.at(reference):
        ref = said()
    pi, total = said(), 0.0
    turn = batch.turn if batch.turn is not None else torch.zeros(len(batch), dtype=torch.long)
    for i in range(len(batch)):
        mates = batch.rewards[(batch.group == batch.group[i]) & (turn == turn[i])]
        advantage = credit[turn[i]] * (batch.rewards[i] - mates.mean())
        for t in (batch.tokens.weights[i] > 0).nonzero()[:, 0]:
            p, q = pi[i, t - 1], ref[i, t - 1]
            total = total - advantage * p[batch.tokens.ids[i, t]] + beta[turn[i]] * (p.exp() * (p - q)).sum()
    return total / len(batch)


@pytest.mark.parametrize("credit, beta", [([1.0, 1.0], [0.1, 0.3]), ([0.0, 1.0], [2.0, 0.05]), ([0.5, 2.0], [0.0, 0.0])])
def test_two_turns_by_the_formula(credit, beta):
    player = policy(objective := SCoRe(credit, beta))
    batch = rollout(player.live.model)
    ours, loss = laws.gradient(player, objective, batch, 3)
    want = by_hand(player, batch, credit, beta)
    want.backward()
    assert loss == pytest.approx(float(want.detach()), rel=1e-4, abs=1e-5)
    assert laws.distance(laws._taken(player), ours)[0] < 1e-4, SEED
    player.live.close()


def test_one_turn_is_reinforce_with_a_kl_and_on_policy_grpo_without_its_scale():
    player = policy(objective := SCoRe([1.0], [0.2]))
    batch = rollout(player.live.model, turns=False)
    ours = laws.gradient(player, objective, batch, 3)[0]
    by_hand(player, batch, [1.0], [0.2]).backward()
    assert laws.distance(laws._taken(player), ours)[0] < 1e-4, SEED
    plain = laws.gradient(player, SCoRe([1.0], [0.0]), batch, 8)[0]
    grpo = laws.gradient(player, GRPO(scale=False), batch, 8)[0]  # sums over tokens there, rows here
    factor = batch.tokens.trained / len(batch)
    assert laws.distance({n: g * factor for n, g in grpo.items()}, plain)[0] < 1e-4, SEED
    twice = laws.gradient(player, SCoRe([1.0, 1.0], [0.2, 0.2]), batch, 8)[0]
    assert laws.distance(twice, ours)[0] < 1e-5  # a second turn that never comes
    player.live.close()


def test_without_credit_the_first_turn_moves_by_the_kl_alone():
    player = policy(SCoRe(), Full())
    batch = rollout(player.live.model)
    first = (batch.turn == 0).nonzero()[:, 0]
    one = SCoRe([0.0, 1.0], [0.7, 0.0])
    before = laws.gradient(player, one, batch, 8)[0]
    batch.rewards[first] = torch.randn(len(first), generator=G) * 9
    assert laws.distance(before, laws.gradient(player, one, batch, 8)[0])[0] == 0.0
    alone = batch.select(first)
    alone.rewards.zero_()
    only = laws.gradient(player, one, alone, 8)[0]
    kl = laws.gradient(player, SCoRe([0.0, 0.0], [0.7, 0.0]), batch.select(first), 8)[0]
    assert laws.norm(only) > 0 and laws.distance(only, kl)[0] < 1e-6, SEED
    assert laws.norm(laws.gradient(player, SCoRe([0.0, 1.0], [0.0, 0.0]), batch.select(first), 8)[0]) == 0
    player.live.close()


def test_it_is_a_hold_on_the_reference():
    """At the reference the KL and its gradient are zero."""
    player = build_players(spec(trainable=[LoRA(rank=3)], objective=SCoRe()), context(base_of("llama_tied")))[0]
    batch = rollout(player.live.model)
    batch.rewards.zero_()
    got = run_batch(player, SCoRe([1.0, 1.0], [1.0, 1.0]), batch, Progress(0, 1), 8)
    assert abs(got.loss) < 1e-5 and laws.norm(laws._taken(player)) < 1e-4
    player.live.close()


def test_more_turns_than_it_knows_are_refused():
    player = policy(objective := SCoRe([1.0], [0.1]))
    with pytest.raises(UserError, match="2 turns"):
        laws.gradient(player, objective, rollout(player.live.model), 8)
    with pytest.raises(ValueError, match="each turn"):
        SCoRe([1.0], [0.1, 0.1])
    player.live.close()
