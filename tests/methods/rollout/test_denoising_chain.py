"""Chains of denoising as decisions: the first gradient is REINFORCE's, a linear chain's is the one written down, a memory of
rewards that outlives a kill."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from temperament import parts
from temperament.bases import train_diffusion as lab
from temperament.bases.load import Base
from temperament.engine.denoise import Sampler, denoise, logp, move
from temperament.engine.noise import process_of
from temperament.errors import UserError
from temperament.nn.batch import Rollout
from temperament.run.laws import distance
from tests.generators import CM, LCM, WORDS, folder, unet
from tests.methods.drive import carried_out, fresh, killed
from tests.tiny import context, gradients, live, seed, shake

pytest.importorskip("diffusers")
PPO = {"critic": None, "gamma": 1.0, "beta": 0.0, "clip": 1e-4, "epochs": 1}
BASES = pytest.mark.parametrize("scheduler", [LCM, CM, lab.SCHEDULERS["unet"]], ids=["lcm", "cm", "ddim"])


def stream(it, rows=6, seeded=None, **options):
    spec = {"captions": {"data.captions": {"captions": WORDS}}, "rewards": ["rewards.brightness"], "group": 3, "steps": 3,
            "guidance": 1.0, **options}  # fmt: skip
    ctx = context(it.base, batch=rows, micro=4, **({} if seeded is None else {"seed": seeded}))
    ctx.live = it
    return parts.build({"rollout.denoising_chain": spec}).open(ctx)


@BASES
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_it_begins_as_reinforce(scheduler, guidance):
    """rho = 1 before the first update, and the gradient is that of -A log pi; then it is whatever split."""
    it = shake(live(unet(scheduler), {"adapters.lora": {"rank": 2, "dropout": 0.3, "targets": ["denoiser/.*to_[qv]"]}}), 0.1)
    whole = stream(it, guidance=guidance).batch(0)
    assert whole.tokens.weights.tolist() == [[1, 1, 0]] * 6 and whole.group.tolist() == [0, 0, 0, 1, 1, 1]
    objective = parts.build({"objectives.policy.ppo": PPO})
    with torch.no_grad():
        torch.testing.assert_close(whole.tokens.logp(it.model), whole.behaviour, rtol=1e-4, atol=1e-4)
    A = whole.rewards[:, None] * whole.tokens.weights
    whole.behaviour = logp(it.model, whole.tokens).detach()
    want = torch.autograd.grad(-(A * logp(it.model, whole.tokens)).sum() / 12, [p.tensor for p in it.params.values()])
    got, out = gradients(it, objective, whole, 6)
    assert out.terms["clipped"] == 0
    assert distance(dict(zip(it.params, want, strict=True)), got)[0] < 1e-3
    assert distance(got, gradients(it, objective, whole, 2)[0])[0] < 1e-3
    grouped = gradients(it, parts.build("objectives.policy.grpo"), whole, 6)[1]
    assert grouped.terms["clipped"] == 0


def test_a_chain_without_a_drawn_step_is_refused():
    it = live(unet(LCM))
    with pytest.raises(UserError, match="at least 2 steps"):
        stream(it, steps=1)
    with pytest.raises(UserError, match="eta above 0"):
        stream(live(unet(lab.SCHEDULERS["unet"])), eta=0.0)
    chain = denoise(it.base, WORDS[:2], record=True).chain.select([0, 1])
    one = type(chain)(*(getattr(chain, k)[:, -1:] for k in ("before", "decisions", "weights", "times", "how")), chain.captions)
    whole = Rollout(one, torch.zeros(2, 1), torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.long))
    got, out = gradients(it, parts.build({"objectives.policy.ppo": PPO}), whole, 2)
    assert out.counts["policy"] == 0 and all((g == 0).all() for g in got.values())


class Line(nn.Module):
    """f = w x + theta, of one number."""

    def __init__(self, w, theta):
        super().__init__()
        self.config = SimpleNamespace(in_channels=1, sample_size=1)
        self.theta, self.w = nn.Parameter(torch.tensor(theta)), w

    def forward(self, sample, timestep, return_dict=False):
        return (self.w * sample + self.theta,)


def test_of_a_line_it_is_the_gradient_one_can_write_down():
    """Two steps, x' = a' (w z + theta) + s' e; what the last, certain step makes of it is w x' + theta_held: dE[r]/dtheta =
    w a' / 2 for the brightness (x + 1) / 2 of one number."""
    w, theta, n = 0.7, 0.2, 40_000
    process = process_of(LCM | {"prediction_type": "sample"})
    base = Base("line", {"denoiser": Line(w, theta)}, {"process": process})
    it = live(base)
    chain = denoise(base, [""] * n, Sampler(2, 0.0, 1.0), seed=seed(), record=True).chain
    rewards = (process.clean(w * chain.decisions[:, 0] + theta, chain.decisions[:, 0], chain.times[:, 1, 0]) + 1) / 2
    rewards = rewards.flatten()
    behaviour = logp(base, chain).detach()
    now, then = chain.times[0, 0]
    a = float(process.scales(then)[0])
    objective = parts.build({"objectives.policy.ppo": PPO})
    whole = Rollout(chain, behaviour, rewards - rewards.mean(), torch.zeros(n, dtype=torch.long))
    got = -float(gradients(it, objective, whole, n)[0]["denoiser/theta"])
    _, spread = move(process, torch.zeros(1, 1), torch.zeros(1, 1), now, then, 0.0)
    slope = float(process.clean(torch.tensor([[w + theta]]), torch.ones(1, 1), then[None])
                  - process.clean(torch.tensor([[theta]]), torch.zeros(1, 1), then[None])) / 2  # fmt: skip
    error = float((rewards - rewards.mean()).std()) * a / spread / n**0.5
    assert got == pytest.approx(slope * a, abs=4 * error) and slope * a > 8 * error


def test_rewards_are_counted_by_caption_and_remembered():
    it = live(unet(LCM))
    options = {"least": 4, "memory": 5, "steps": 2}
    one = stream(it, **options)
    first, second = one.batch(0), one.batch(1)
    two = stream(it, seeded=one.ctx.seed, **options)
    two.load_state_dict({"tensors": {}, **{"json": one.state_dict()["json"]}})
    marks = parts.build("rewards.brightness")
    raw = lambda s, k: torch.cat([p[-1][None] for p in s._painted(it.base, _said(s, k), _ids(s, k), 1 + k)])
    values = [marks.value(raw(one, k), []).tolist() for k in (0, 1, 2)]
    mean, std = torch.tensor(values[0]).mean(), torch.tensor(values[0]).std(correction=0)
    torch.testing.assert_close(first.rewards, (torch.tensor(values[0]) - mean) / (std + 1e-6), rtol=1e-3, atol=1e-3)
    seen: dict = {}
    for k in (0, 1):
        for c, v in zip(_said(one, k), values[k], strict=True):
            seen[c] = [*seen.get(c, []), v][-5:]
    for i, (c, v) in enumerate(zip(_said(one, 1), values[1], strict=True)):
        known = torch.tensor(seen[c] if len(seen[c]) >= 4 else values[1])
        want = (v - known.mean()) / (known.std(correction=0) + 1e-6)
        assert float(second.rewards[i]) == pytest.approx(float(want), rel=1e-2, abs=1e-3)
    third, again = one.batch(2), two.batch(2)
    assert torch.equal(third.rewards, again.rewards) and torch.equal(third.tokens.decisions, again.tokens.decisions)
    assert one.feedback([], {})["reward"] == pytest.approx(sum(values[2]) / 6, rel=1e-4)


def _said(s, k):
    return [c for c in s.asked.batch(k).captions for _ in range(3)]


def _ids(s, k):
    return (s.asked.batch(k).examples[:, None] * 3 + torch.arange(3)).flatten()


@pytest.mark.parametrize("scheduler", [LCM, lab.SCHEDULERS["unet"]], ids=["rlcm", "ddpo"])
def test_killed_in_the_middle_it_ends_in_the_same_bits(tmp_path, scheduler):
    base = folder(unet(scheduler, 3), tmp_path / "base")
    source = {"captions": {"data.captions": {"captions": WORDS}}, "rewards": ["rewards.brightness"], "group": 2, "steps": 3,
              "least": 2, "memory": 4}  # fmt: skip
    train = {"source": {"rollout.denoising_chain": source}, "objective": {"objectives.policy.ppo": PPO}, "batch": 4, "micro": 2,
             "trainable": {"adapters.lora": {"rank": 2, "targets": ["denoiser/.*to_[qv]"]}}, "steps": 4,
             "optimizer": {"optim.adamw": {"lr": 1e-3}}}  # fmt: skip
    recipe = {"base": base, "seed": fresh(), "steps": [{"name": "sft", "train": train}],
              "evaluation": {"items": 2, "keep": False, "diagnose": [], "suites": []}}  # fmt: skip
    one, two = carried_out(recipe, tmp_path / "one"), killed(recipe, tmp_path / "two", 2)
    assert one.json["delta"]["digest"] == two.json["delta"]["digest"]
    assert '"reward": ' in (tmp_path / "one" / "log.jsonl").read_text()
