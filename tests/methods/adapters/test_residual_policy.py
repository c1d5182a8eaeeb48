"""A residual policy on a frozen one: off is the base to the bit, PPO on decisions is PPO on words, killed and resumed it is the
same."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import gradients, player, seed, shake, views
from torch.distributions import Normal

from temperament import parts
from temperament.bases.load import Base, load
from temperament.bases.worlds import control
from temperament.delta import Delta
from temperament.engine.episodes import play
from temperament.errors import UserError
from temperament.methods.adapters.residual_policy import ResidualPolicy
from temperament.methods.adapters.value_head import ValueHead
from temperament.methods.objectives.policy.ppo import PPO, at_the_end
from temperament.methods.objectives.policy.value import Value
from temperament.methods.optim.adamw import AdamW
from temperament.methods.rollout.episodes import Episodes
from temperament.methods.select.full import Full
from temperament.nn.batch import Rollout, Steps
from temperament.nn.policy import Policy, PolicyConfig
from temperament.protocols import Progress
from temperament.run import laws
from temperament.run.layouts import padded
from temperament.run.recipe import PlayerSpec
from temperament.run.training import build_players
from temperament.train.loop import prepared
from tests.resuming import killed_and_resumed, same_to_the_bit
from tests.train.rows import context, spec

SEED = seed()
SEEN = control.Peg.observations


def base(horizon: int = 8, execute: int = 8, layers: int = 2) -> Base:
    torch.manual_seed(SEED)
    return Base("tiny/policy", {"policy": Policy(PolicyConfig("peg", SEEN, 2, horizon, execute, 16, layers)).eval()})


def world(n: int = 12, task: str = "insert", purpose: str = "test") -> control.Peg:
    return control.make("peg", task, torch.arange(n), SEED, purpose)


def live(on: Base, **options):
    from tiny import live as make

    return make(on, {"adapters.residual_policy": {"width": 12, **options}})


def path(model, it) -> torch.Tensor:
    """(2 + T, episodes): the whole of what happened."""
    seen = []
    step = it.step
    it.step = lambda a: seen.append((a.clone(), *(out := step(a))[:1])) or out
    got = play(model, it)
    return torch.cat([got.success, got.length, *(t.flatten() for pair in seen for t in pair)])


# ---- off is the base -------------------------------------------------------------------------------------------------------


def test_at_its_start_and_switched_off_it_acts_as_the_base_to_the_bit():
    on = base()
    alone = path(on.model, world())
    it = live(on)
    assert torch.equal(path(on.model, world()), alone)  # gain 0: it begins by correcting nothing
    shake(it, 0.5)
    assert not torch.equal(path(on.model, world()), alone)
    moved = path(on.model, world())
    with it.at("base"):
        assert torch.equal(path(on.model, world()), alone)
    delta = it.delta()
    it.close()
    assert torch.equal(path(on.model, world()), alone)
    on.apply(delta, 0.0)  # the dial at 0
    assert torch.equal(path(on.model, world()), alone)
    on.reset()
    on.apply(delta)
    assert torch.equal(path(on.model, world()), moved)
    assert torch.equal(path(_pure(on), world()), alone)


def _pure(on):
    from temperament.engine.measure import Pure

    return Pure(on)


def test_what_is_saved_is_what_was_trained(tmp_path):
    on = base()
    it = shake(live(on, scale=0.3), 0.4)
    moved, delta = path(on.model, world()), it.delta()
    it.close()
    delta.save(tmp_path / "d")
    on.apply(Delta.load(tmp_path / "d"))
    assert torch.equal(path(on.model, world()), moved) and delta.merges == {"policy/residual": "never"}


def test_two_residuals_correct_one_after_the_other():
    on = base()
    first = shake(live(on, scale=0.3), 0.4)
    delta = first.delta()
    moved = path(on.model, world())
    first.close()
    on.apply(delta)
    it = live(on)
    assert torch.equal(path(on.model, world()), moved)  # a second one begins as the first ended
    shake(it, 0.3)
    assert not torch.equal(path(on.model, world()), moved)
    it.close()


def test_the_base_gets_no_gradient_and_plans_when_a_plan_is_used_up():
    for horizon, execute in ((8, 8), (8, 3), (5, 1)):
        on = base(horizon, execute)
        it = live(on)
        frozen = {n: p.detach().clone() for n, p in on.parameters()}
        got = play(on.model, control.make("peg", "insert", torch.arange(6), SEED), "step", (SEED, 0))
        times = int(got.length.max())
        assert got.plans == math.ceil(times / execute), (horizon, execute)
        (-got.steps.logp(on.model).sum()).backward()
        assert all(p.grad is None and torch.equal(p, frozen[n]) for n, p in on.parameters())
        assert any(p.tensor.grad is not None for p in it.params.values())
        it.close()


# ---- log-probs and PPO -----------------------------------------------------------------------------------------------------


def rollout(on: Base, it, n: int = 8, explore: str = "step", **more) -> Rollout:
    ctx = context(on)
    ctx.live, ctx.batch, ctx.seed = it, n, SEED
    return Episodes("wide", explore, **more).open(ctx).batch(3)


def test_log_probs_are_gaussian_of_the_decision_and_do_not_know_the_scale():
    for explore in ("step", "plan"):
        on = base(horizon=8, execute=5)
        it = shake(live(on), 0.3) if explore == "step" else _full(on)
        got = rollout(on, it, explore=explore)
        steps = got.tokens
        said = on.model(steps.observations, steps.planned)
        k = steps.decisions.shape[-1]
        want = Normal(said.mean[..., :k], said.log_std[:k].exp()).log_prob(steps.decisions).sum(-1)
        assert torch.allclose(steps.logp(on.model), want, atol=1e-4) and torch.allclose(got.behaviour, want, atol=1e-4)
        if explore == "step":
            other = next(p for part in it.parts for _, p in part.attached())
            other.scale *= 7
            assert torch.equal(steps.logp(on.model), want.detach()) or torch.allclose(steps.logp(on.model), want, atol=1e-4)
            assert not torch.allclose(said.action(), on.model(steps.observations, steps.planned).action())
        assert k == (2 if explore == "step" else 10)
        it.close()


def _full(on):
    from tiny import live as make

    return make(on, "select.full")


def test_rewards_of_steps_are_used_as_they_came_and_a_last_reward_is_the_same():
    w = (torch.rand(4, 9) < 0.6).float()
    w[:, 2] = 1
    R = torch.randn(4)
    each = at_the_end(R, w)
    assert torch.equal(at_the_end(each, w), each) and torch.allclose(each.sum(1), R)
    noise = torch.randn(4, 9)
    assert torch.equal(at_the_end(noise, w), noise * w)


def test_advantages_of_episodes_are_the_sums_they_stand_for():
    on = base()
    it = shake(live(on), 0.3)
    batch = rollout(on, it)
    batch.rewards = torch.randn(batch.rewards.shape) * batch.tokens.weights
    gamma, lam = 0.93, 0.8
    critic = {"critic": PlayerSpec({"Rollout": Value()}, AdamW(1e-3), [ValueHead(hidden=7)])}
    it.close()
    players = build_players(
        spec(trainable=[ResidualPolicy(width=12)], objective=PPO(gamma=gamma, lam=lam, beta=0.0), players=critic), context(on)
    )
    for p in players[1].live.params.values():
        p.tensor.data += 0.3 * torch.randn(p.tensor.shape)
    whole = prepared(players[0], players[0].objectives["Rollout"], batch.select(range(8)), Progress(0, 1))
    head = players[1].live.heads["value"]
    for i in range(8):
        T = int(batch.tokens.weights[i].sum())
        x = torch.cat([batch.tokens.observations[i, :T], batch.tokens.planned[i, :T]], -1)
        v = torch.cat([head(x)[:, 0].detach(), torch.zeros(1)])
        r = batch.rewards[i, :T]
        delta = r + gamma * v[1:] - v[:-1]
        want = torch.stack([sum((gamma * lam) ** (k - j) * delta[k] for k in range(j, T)) for j in range(T)])
        assert torch.allclose(whole.advantages[i, :T], want, atol=1e-4), SEED
        assert torch.allclose(whole.returns[i, :T], want + v[:-1], atol=1e-4) and bool((whole.advantages[i, T:] == 0).all())
    for p in players:
        p.live.close()


def test_at_first_ppo_is_the_policy_gradient():
    on = base()
    it = shake(live(on), 0.3)
    batch = rollout(on, it)
    batch.rewards = torch.randn(batch.rewards.shape) * batch.tokens.weights
    ppo = PPO(critic=None, gamma=0.9, lam=1.0, beta=0.0)
    got, out = gradients(it, ppo, batch.select(range(8)), 8)
    assert out.terms["clipped"] == 0
    w, T = batch.tokens.weights, batch.tokens.weights.shape[1]
    to_go = torch.stack([sum(0.9 ** (k - t) * batch.rewards[:, k] for k in range(t, T)) for t in range(T)], 1)
    for p in it.params.values():
        p.tensor.grad = None
    (-(batch.tokens.logp(on.model) * to_go * w).sum() / w.sum()).backward()
    want = {n: p.tensor.grad.clone() for n, p in it.params.items()}
    assert laws.distance(want, got)[0] < 1e-4 and laws.norm(want) > 0
    it.close()


@pytest.mark.parametrize("objective", ["ppo", "grpo", "sequence", "value"])
@pytest.mark.parametrize("explore", ["step", "plan"])
def test_no_split_and_no_padding_changes_a_gradient(objective, explore):
    on = base()
    part = {"ppo": PPO(critic=None, whiten=True, beta=0.0), "value": Value()}.get(objective) or parts.build(
        {"objectives.policy.grpo": {"per": "sequence" if objective == "sequence" else "token"}}
    )
    it = (shake(live(on), 0.2) if explore == "step" else shake(_full(on), 0.01)) if objective != "value" else None
    if it is None:
        from tiny import live as make

        it = shake(make(on, {"adapters.value_head": {"hidden": 5}}), 0.3)
        explorer = shake(live(on), 0.3) if explore == "step" else None
        batch = rollout(on, explorer or it, explore=explore, group=4)
        if explorer:
            explorer.close()
        batch.values, batch.returns = (torch.randn(batch.rewards.shape) for _ in range(2))
    else:
        batch = rollout(on, it, explore=explore, group=4)
    batch.rewards = torch.randn(batch.rewards.shape) * batch.tokens.weights
    copy = lambda b: b.select(range(len(b)))
    whole, out = gradients(it, part, copy(batch), 8)
    assert laws.norm(whole) > 0
    for other, micro in ((copy(batch), 1), (copy(batch), 3), (padded(batch, 4), 8)):
        again, told = gradients(it, part, other, micro)
        assert laws.distance(whole, again)[0] < 2e-5 and told.loss == pytest.approx(out.loss, abs=1e-5)
    it.close()


# ---- batches and worlds ----------------------------------------------------------------------------------------------------


def test_an_episode_is_the_same_in_any_company():
    on = base()
    it = shake(live(on), 0.3)
    some = torch.tensor([7, 2, 11])
    for task in control.TASKS:
        together = play(on.model, control.make("peg", task, torch.arange(12), SEED, "test"))
        apart = play(on.model, control.make("peg", task, some, SEED, "test"))
        assert torch.equal(together.success[some], apart.success) and torch.equal(together.length[some], apart.length)
    one, two = rollout(on, it, 8), rollout(on, it, 8)
    assert all(
        torch.equal(getattr(one.tokens, k), getattr(two.tokens, k)) for k in ("observations", "planned", "decisions", "weights")
    )
    grouped = rollout(on, it, 8, group=4)
    assert (
        torch.equal(grouped.tokens.observations[0, 0], grouped.tokens.observations[3, 0])
        and grouped.group.tolist() == [0] * 4 + [1] * 4
    )
    assert not torch.equal(grouped.tokens.decisions[0, 0], grouped.tokens.decisions[3, 0])
    it.close()


def test_the_world_is_what_it_says():
    for task in control.TASKS:
        it = control.make("peg", task, torch.arange(300), SEED)
        it.reset()
        paid, before = torch.zeros(300), None
        for t in range(it.limit):
            still = it.done.clone()
            place = it.x.clone(), it.y.clone()
            _, reward, done, late, _ = it.step(it.expert())
            assert (
                bool((reward[still] == 0).all())
                and torch.equal(place[0][still], it.x[still])
                and torch.equal(place[1][still], it.y[still])
            )
            inside = it.y < 0
            assert (
                bool(((it.x - it.goal[:, 0]).abs()[inside] <= it.half + 1e-6).all()) and float(it.y.min()) >= -it.depth - 1e-6
            )
            assert bool(late.all()) == (t + 1 >= it.limit)
            paid, before = paid + reward, done
        assert torch.equal(paid, before.float()) and float(paid.mean()) > 0.7, (task, SEED)  # 0.83 of 20,000 insertions
    other = control.make("peg", "insert", torch.arange(300), SEED, "test")
    assert not torch.equal(other.reset()[0], control.make("peg", "insert", torch.arange(300), SEED).reset()[0])


def test_demonstrations_are_the_actions_that_were_taken():
    seen, plans, weight = control.demonstrated("peg", "insert", torch.arange(20), SEED, 8, 0.05, 0.2)
    it = control.make("peg", "insert", torch.arange(20), SEED)
    now = it.reset()[0]
    for t in range(it.limit):
        alive = weight[:, t] > 0
        assert torch.equal(alive, ~it.done) and torch.equal(seen[alive, t], now[alive])
        now, *_ = it.step(plans[:, t, :2])
    assert torch.equal(plans[:, 0, 2:4], plans[:, 1, :2])


def test_steps_are_trimmed_and_split_like_tokens():
    n, T = 5, 7
    w = (torch.arange(T) < torch.tensor([[2], [4], [1], [3], [4]])).float()
    steps = Steps(torch.randn(n, T, 3), torch.randn(n, T, 2), w, torch.randn(n, T, 2))
    assert steps.trim().weights.shape == (n, 4) and steps.trained == 14.0 and torch.equal(steps.mask, w > 0)
    assert torch.allclose(steps.per_example().weights.sum(1), torch.ones(n))
    assert torch.equal(torch.cat([s.decisions for s in steps.split(2)]), steps.decisions)
    on = base()
    assert steps.states(on.model).shape == (n, T, 5) and bool((steps.states(on.model)[w == 0] == 0).all())
    assert Steps(steps.observations, steps.decisions, w).states(on.model)[..., 3:].abs().max() == 0


def test_what_cannot_be_is_refused_in_a_sentence():
    on = base()
    it = _full(on)
    with pytest.raises(UserError, match=r"decides at every step, or explore: plan"):
        rollout(on, it)
    it.close()
    with pytest.raises(UserError, match=r"insrt.*insert"):
        Episodes("insrt").open(context(on))
    from tiny import tiny

    text = tiny("llama")
    for refused in (lambda: Episodes("insert").open(context(text)), lambda: ResidualPolicy().build(text, context(text))):
        with pytest.raises(UserError, match="lab/policy"):
            refused()
    with pytest.raises(UserError, match="language model or a policy"):
        ValueHead().build(Base("x", {"net": torch.nn.Linear(2, 2)}), context(on))


def test_the_lab_policy_is_the_one_on_its_card():
    from temperament.bases.train_policy import LAB, measured

    on = load("lab/policy")
    import json

    card = json.loads((LAB / "policy" / "measured.json").read_text())
    assert measured(on.model, 300)["insert"] == pytest.approx(card["insert"], abs=0.08) and 0.35 < card["insert"] < 0.5
    assert min(card[t] for t in ("wide", "reach", "lift", "rest")) > 0.85
    assert set(on.components) == {"policy"} and on.suites == ["evaluate.control"]
    assert sum(f.stat().st_size for f in (LAB / "policy").rglob("*")) < 1 << 20


# ---- the whole way ---------------------------------------------------------------------------------------------------------

CRITIC = {
    "objective": {"Rollout": {"objectives.policy.value": {"epochs": 2}}},
    "trainable": [{"adapters.value_head": {"hidden": 8}}],
}
TRAIN = {
    "source": {"rollout.episodes": {"task": "insert"}},
    "objective": {"objectives.policy.ppo": {"beta": 0.01, "epochs": 2, "minibatches": 2, "whiten": True}},
    "trainable": {"adapters.residual_policy": {"width": 8, "scale": 0.5}},
    "optimizer": {"optim.adamw": {"lr": 3e-3}},
    "batch": 16,
    "steps": 4,
    "save": {"steps": 1},
    "players": {"critic": CRITIC},
}


def test_killed_and_resumed_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPERAMENT_CACHE", str(tmp_path / "cache"))
    evaluation = {
        "items": 20,
        "keep": False,
        "base": False,
        "suites": [{"evaluate.control": {"target": "insert", "retained": ["lift"]}}],
    }
    document = {"base": "lab/policy", "check": True, "evaluation": evaluation, "steps": [{"name": "residual", "train": TRAIN}]}
    whole, killed = killed_and_resumed(document, tmp_path, [2, 1])
    assert same_to_the_bit(whole, killed) and whole.json["delta"]["parameters"] > 0
    found = {law["name"]: law for law in whole.json["check"]["steps"][0]["laws"]}
    assert all(law["ok"] for law in found.values()) and found["rows together = one by one"]["deviation"] < 1e-4
    assert found["padding"]["detail"].startswith("5 more columns")
    assert {s["name"] for s in whole.json["ledger"]["skills"]} == {"insert", "lift"}


def test_plans_are_trained_by_the_same_objectives(tmp_path):
    on = base()
    players = build_players(
        spec(
            trainable=[Full()],
            objective=PPO(beta=0.0),
            players={"critic": PlayerSpec({"Rollout": Value()}, AdamW(1e-3), [ValueHead(hidden=7)])},
        ),
        context(on),
    )
    batch = rollout(on, players[0].live, explore="plan")
    got, _ = laws.gradient(players[0], players[0].objectives["Rollout"], batch, 3)
    assert batch.tokens.weights.shape[1] == 5 and batch.tokens.planned is None
    assert "policy/log_std" in got or float(batch.rewards.sum()) == 0
    assert views(players[0].live).model is on.model and player(players[0].live, PPO()).name == "policy"
    for p in players:
        p.live.close()
