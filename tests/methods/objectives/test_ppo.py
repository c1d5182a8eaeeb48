"""PPO with a critic beside it: closed forms, and two players on one base that leave each other alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from temperament.errors import UserError
from temperament.methods.adapters.lora import LoRA
from temperament.methods.adapters.value_head import ValueHead
from temperament.methods.objectives.policy.ppo import PPO, at_the_end, generalised_advantages
from temperament.methods.objectives.policy.value import Value
from temperament.methods.optim.adamw import AdamW
from temperament.methods.rewards.number import Number
from temperament.methods.select.full import Full
from temperament.nn.batch import Rollout
from temperament.nn.logprobs import label, score
from temperament.protocols import Progress
from temperament.run import laws
from temperament.run.recipe import PlayerSpec
from temperament.run.training import build_players
from temperament.train.loop import accumulate, prepared, train
from tests.train.rows import base_of, context, spec, tokens

SEED = int(torch.seed() % 10**6)
G = torch.Generator().manual_seed(SEED)


def test_generalised_advantages_are_the_sums_they_stand_for():
    rows, length, gamma = 4, 9, 0.9
    w = (torch.rand(rows, length, generator=G) < 0.6).float()
    w[:, 3] = 1
    r, v = torch.randn(rows, length, generator=G) * w, torch.randn(rows, length, generator=G) * w
    for lam in (0.0, 0.5, 1.0):
        got = generalised_advantages(r, v, w, gamma, lam)
        for i in range(rows):
            at = [t for t in range(length) if w[i, t]]
            rs, vs = r[i, at], torch.cat([v[i, at], torch.zeros(1)])
            delta = rs + gamma * vs[1:] - vs[:-1]
            want = [sum((gamma * lam) ** (k - j) * delta[k] for k in range(j, len(at))) for j in range(len(at))]
            assert torch.allclose(got[i, at], torch.stack(want), atol=1e-5), (lam, SEED)
            if lam == 1:  # what came after, less what was expected
                to_go = torch.stack([sum(gamma ** (k - j) * rs[k] for k in range(j, len(at))) for j in range(len(at))])
                assert torch.allclose(got[i, at], to_go - v[i, at], atol=1e-5)
        assert bool((got[w == 0] == 0).all())
    rewards = torch.randn(rows, generator=G)
    undiscounted = generalised_advantages(at_the_end(rewards, w), 0 * v, w, 1.0, 1.0)
    assert torch.allclose(undiscounted, rewards[:, None] * w)


def rollout(model, n=4, zero=False) -> Rollout:
    one = tokens(n, SEED)
    with torch.no_grad():
        behaviour = score(model, one, label())["label"]
    return Rollout(one, behaviour, torch.zeros(n) if zero else torch.rand(n, generator=G), torch.arange(n))


CRITIC = PlayerSpec({"Rollout": Value(epochs=2)}, AdamW(1e-2), [LoRA(rank=2), ValueHead()])


def players(main=(Full(),), critic=CRITIC, ppo=PPO(), **more):
    base = base_of("llama_tied")
    return build_players(
        spec(trainable=list(main), objective=ppo, optimizer=AdamW(1e-3), players={"critic": critic}, **more), context(base)
    )


def close(some):
    for p in some:
        p.live.close()


def test_no_reward_and_an_exact_critic_teach_nothing():
    policy, _ = both = players(ppo=PPO(beta=0.0))
    got, loss = laws.gradient(policy, policy.objectives["Rollout"], rollout(policy.live.model, zero=True), 2)
    assert laws.norm(got) == 0 and loss == 0
    close(both)


def test_at_the_start_the_price_is_zero_and_clipping_changes_nothing():
    policy, _ = both = players(ppo=PPO(beta=0.5, gamma=1.0))
    batch = rollout(policy.live.model)
    whole = prepared(policy, policy.objectives["Rollout"], batch.select(range(4)), Progress(0, 1))
    w = whole.tokens.weights
    assert float(((whole.behaviour - whole.reference) * w).abs().max()) < 1e-5
    assert torch.allclose(whole.advantages, whole.rewards[:, None] * w, atol=1e-5)
    got = laws.gradient(policy, policy.objectives["Rollout"], batch, 2)[0]
    logp = score(policy.live.model, batch.tokens, label())["label"]
    (-(logp * batch.rewards[:, None] * w).sum() / batch.tokens.trained).backward()  # REINFORCE
    assert laws.distance(laws._taken(policy), got)[0] < 1e-4
    free = laws.gradient(policy, PPO(clip=1e9, beta=0.5, gamma=1.0), batch, 2)[0]
    assert laws.distance(free, got)[0] < 1e-6
    close(both)


@pytest.mark.parametrize("main", [(Full(),), (LoRA(rank=3),)], ids=["full", "lora"])
@pytest.mark.parametrize(
    "own", [[LoRA(rank=2), ValueHead()], [Full(), ValueHead()], [ValueHead()]], ids=["lora", "full", "head"]
)
@pytest.mark.parametrize("on", ["policy", "start"])
def test_two_players_on_one_base_leave_each_other_alone(main, own, on):
    policy, critic = both = players(main, PlayerSpec({"Rollout": Value()}, AdamW(1e-2), own, on=on))
    one = tokens(3, SEED)
    says = lambda: score(policy.live.model, one, label())["label"].detach()
    before, batch = says(), rollout(policy.live.model)
    # The critic learns: the policy, its gradients and what it says stay as they are.
    prepared(policy, policy.objectives["Rollout"], batch, Progress(0, 1))
    assert float(batch.values.abs().max()) == 0 and bool((batch.returns != 0).any())
    for _ in range(3):
        with critic.live.at("live"):
            accumulate(critic, critic.objectives["Rollout"], batch, Progress(0, 1), 2)
        assert all(p.tensor.grad is None for p in policy.live.params.values())
        assert any(p.tensor.grad is not None for p in critic.live.params.values())
        for group in critic.stepper.param_groups:
            group["lr"] = 1e-2
        critic.stepper.step()
        critic.stepper.zero_grad()
    assert torch.equal(before, says())
    prepared(policy, policy.objectives["Rollout"], again := rollout(policy.live.model), Progress(0, 1))
    assert bool((again.values != 0).any())
    # The policy learns: a critic on it follows, one on the start does not.
    kept = {n: p.tensor.detach().clone() for n, p in critic.live.params.items()}
    with torch.no_grad():
        for p in policy.live.params.values():
            p.tensor.add_(0.05 * torch.randn(p.tensor.shape, generator=G))
    prepared(policy, policy.objectives["Rollout"], later := rollout(policy.live.model), Progress(0, 1))
    assert all(torch.equal(kept[n], p.tensor) for n, p in critic.live.params.items())
    own_model = any(isinstance(t, Full) for t in own) and (on == "start" or isinstance(main[0], Full))
    same = torch.allclose(again.values, later.values, atol=1e-6)
    assert same == (on == "start" or own_model), (on, own)
    close(both)


def test_several_updates_on_one_rollout_prepare_it_once():
    policy, _ = both = players(ppo=PPO(epochs=3, minibatches=2, beta=0.1))
    rows, asked = [], []

    class Once:
        def batch(self, step, progress):
            asked.append(step)
            return rollout(policy.live.model)

    steps = []
    for p in both:
        p.stepper.register_step_post_hook(lambda *_, name=p.name: steps.append(name))
    train(both, Once(), 2, micro=2, record=rows.append)
    assert asked == [0, 1] and steps == (["policy"] * 6 + ["critic"] * 2) * 2
    assert {"policy/policy", "policy/kl", "critic/value"} <= rows[0]["terms"].keys()
    close(both)


def test_a_denoising_chain_takes_no_critic():
    chain = SimpleNamespace(tokens=SimpleNamespace(weights=torch.ones(2, 3)))
    with pytest.raises(UserError, match="critic: null"):
        PPO().prepare(chain, None)


def test_partial_marks():
    marks = Number(partial=0.1).score("", ["it is 42", "7; 41", "none", "4 2"], {"answer": "so 42"})
    assert marks == [1.0, 0.1, 0.0, 0.1] and Number().score("", ["41"], {"answer": "42"}) == [0.0]
