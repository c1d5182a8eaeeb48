"""Gradients of rewards through the sampler: closed form of a linear chain, truncation, recomputation, any split; rewards."""

import pytest
import torch
from tiny import context, gradients, live, seed, shake, views
from torch import nn

from temperament import parts
from temperament.bases import train_diffusion as lab
from temperament.bases.load import Base
from temperament.engine.denoise import Denoiser, Sampler, denoise
from temperament.engine.noise import Flow
from temperament.errors import UserError
from temperament.nn.batch import Captions
from temperament.train.trained import Param, Trained

pytest.importorskip("diffusers")
NAME = "objectives.diffusion.reward_backprop"
WORDS = ["a red cross at the top left on navy", "a blue disc on black", "a white bar at the top right on grey"]


class Config:
    in_channels, sample_size = 2, 4


class Line(nn.Module):
    """v = a x + theta: a chain whose gradient can be written down."""

    def __init__(self, a: float):
        super().__init__()
        self.theta, self.a, self.config = nn.Parameter(torch.randn(2, 1, 1)), a, Config()

    def forward(self, sample, timestep, return_dict=False):
        return (self.a * sample + self.theta,)


class First:
    """The reward of these tests: w . x, whose gradient is w."""

    part_name = "rewards.first"

    def __init__(self, w):
        self.w = w

    def value(self, pixels, captions):
        return (pixels * self.w).flatten(1).sum(1)


def objective(**options):
    return parts.build({NAME: {"rewards": ["rewards.brightness"], "steps": 4, **options}})


def reward_of(made, reward):
    object.__setattr__(made, "rewards", [reward])
    return made


def batch(n=3):
    return Captions(torch.randint(0, 1 << 30, (n,)), [WORDS[i % 3] for i in range(n)])


@pytest.mark.parametrize("keep", [0, 1, 3, 5])
def test_the_gradient_of_a_linear_chain_is_its_closed_form(keep):
    """x' = x + dt (a x + theta), so d x_0 / d theta = sum over the last K steps of dt_i prod_{j > i} (1 + dt_j a)."""
    a, T = float(torch.rand(1) - 0.5), 5
    net = Line(a)
    base = Base("line", {"denoiser": net}, {"scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"}}, sha256={"-": "-"})
    w = torch.randn(2, 4, 4)
    made = denoise(base, ["", ""], Sampler(T, 0.0, 1.0), seed=seed(), keep=keep)
    dt = Flow().grid(T).diff()
    want = sum(float(dt[i]) * float(torch.prod(1 + dt[i + 1 :] * a)) for i in range(T - keep, T))
    if keep == 0:
        assert not made.pixels.requires_grad
        return
    (got,) = torch.autograd.grad(First(w).value(made.pixels, ["", ""]).mean(), net.theta)
    torch.testing.assert_close(got.flatten(), want * w.sum((1, 2)) / 2, rtol=1e-4, atol=1e-5)  # (pixels are half of -1..1)


@pytest.fixture(scope="module", params=["unet", "flow"])
def base(request):
    return lab.fresh(request.param, 3)


def trained(base):
    """A few tensors of every kind, the text encoder's among them."""
    inside = ("attn", "conv_out", "proj_out")
    names = [n for n, _ in base.parameters() if n.endswith("weight") and any(k in n for k in inside)][:6]
    names += [n for n, _ in base.parameters() if n.startswith("text_encoder/") and n.endswith("q_proj.weight")][:1]
    known = dict(base.parameters())
    from temperament.train.live import Live

    return Live(base, [Trained([Param(n, known[n], base=known[n]) for n in names])])


def test_any_split_and_recomputation_give_the_same_gradient(base):
    it, rows = trained(base), batch()
    try:
        whole, got = gradients(it, objective(), rows, 3)
        assert got.counts == {"brightness": 3} and got.loss == pytest.approx(-got.terms["brightness"])
        largest = max(float(g.norm()) for g in whole.values())
        assert all(float(g.norm()) > 0 for g in whole.values())
        for other in (gradients(it, objective(), rows, 1)[0], gradients(it, objective(recompute=False), rows, 3)[0]):
            assert all(float((other[n] - g).norm()) < 1e-4 * largest for n, g in whole.items())
    finally:
        it.close()


def test_the_whole_chain_is_truncation_at_its_length_and_none_gives_no_gradient(base):
    it, rows = trained(base), batch(2)
    try:
        full = gradients(it, objective(least=4), rows, 2)[0]
        denoiser = Denoiser.of(base)
        pixels = denoise(denoiser, rows.captions, objective().sampler(denoiser), seed=0, ids=rows.examples, keep=4).pixels
        value = -parts.build("rewards.brightness").value(pixels, rows.captions).mean()
        plain = torch.autograd.grad(value, [p.tensor for p in it.params.values()])
        for g, h in zip(full.values(), plain, strict=True):
            torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-6)
        assert all(float(g.norm()) == 0 for g in gradients(it, objective(least=0, most=0), rows, 2)[0].values())
        short = gradients(it, objective(least=1, most=1), rows, 2)[0]
        assert any(float((short[n] - g).norm()) > 1e-3 * float(g.norm()) for n, g in full.items())
    finally:
        it.close()


def test_how_many_steps_are_kept_is_drawn_by_address():
    made, s = objective(least=0), seed()
    drawn = [made.kept(s, k) for k in range(300)]
    assert drawn == [made.kept(s, k) for k in range(300)] and set(drawn) == set(range(5))
    assert all(abs(drawn.count(k) / 300 - 0.2) < 0.12 for k in range(5))
    assert {objective(least=2, most=2).kept(s, k) for k in range(9)} == {2}
    for bad in ({"least": 5}, {"most": 9}, {"rewards": []}, {"weights": [1.0, 2.0]}):
        with pytest.raises(UserError, match=r"rewards|least"):
            objective(**bad)


def test_rewards_add_up_by_their_weights(base):
    it, rows = live(base, {"adapters.lora": {"rank": 2}}), batch(2)
    shake(it)
    two = ["rewards.brightness", {"rewards.colour": {"target": [1.0, 0.0, 0.0]}}, {"rewards.colour": {}}]
    try:
        one = [gradients(it, objective(rewards=[r]), rows, 2)[0] for r in two]
        both, got = gradients(it, objective(rewards=two, weights=[1.0, 0.5, 2.0]), rows, 2)
        assert set(got.terms) == {"brightness", "colour", "colour-2"}
        scale = max(float(g.norm()) for g in both.values())
        for n, g in both.items():
            assert float((g - one[0][n] - 0.5 * one[1][n] - 2 * one[2][n]).norm()) < 1e-4 * scale
    finally:
        it.close()


def test_steps_raise_the_reward(base):
    """A few steps of the real thing on an untrained network."""
    made = objective(steps=3, least=3)
    it, rows = live(base, {"adapters.lora": {"rank": 4}}), batch(4)
    stepper = torch.optim.Adam([p.tensor for p in it.params.values()], 1e-2)
    found = []
    try:
        for _ in range(6):
            stepper.zero_grad()
            terms = made.loss(rows, views(it))
            (-terms["brightness"].value).backward()
            found.append(float(terms["brightness"].value.detach()) / 4)
            stepper.step()
    finally:
        it.close()
    assert found[-1] > found[0] + 0.01


# ---- the rewards -----------------------------------------------------------------------------------------------------------


def test_rewards_of_colour_and_brightness_by_hand():
    grey, bright, colour = torch.full((1, 3, 5, 7), 0.25), parts.build("rewards.brightness"), "rewards.colour"
    assert bright.value(grey, [""]).item() == pytest.approx(0.25)
    assert parts.build({"rewards.brightness": {"target": 0.0}}).value(grey, [""]).item() == pytest.approx(0.75)
    assert bright.value(grey + 5, [""]).item() == pytest.approx(1.0, abs=1e-5)  # nothing is won beyond white
    assert parts.build({colour: {"target": [0.25, 0.25, 1.0]}}).value(grey, [""]).item() == pytest.approx(0.75)


@pytest.mark.parametrize("size", [(16, 16), (13, 22)])
def test_an_even_picture_is_the_most_compressible(size):
    made, x = parts.build("rewards.compressibility"), torch.rand(3, 3, *size)
    assert made.value(torch.full_like(x, 0.5), [""] * 3).abs().max() < 1e-5
    smooth = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    assert (made.value(smooth, [""] * 3) > made.value(x, [""] * 3)).all() and (made.value(x, [""] * 3) < 0).all()
    from temperament.methods.rewards.compressibility import _cosines

    torch.testing.assert_close(_cosines() @ _cosines().T, torch.eye(8), atol=1e-6, rtol=0)


def test_captions_come_in_an_order_of_their_own_and_each_once_an_epoch(tmp_path):
    (tmp_path / "words.txt").write_text("four\n\n  five \n", encoding="utf-8")
    source = parts.build({"data.captions": {"captions": ["one", "two", "three"], "path": str(tmp_path / "words.txt")}})
    s = seed()
    stream = source.open(context(lab.fresh("unet", 1), seed=s, batch=2))
    assert stream.steps_per_epoch == 3
    said = [c for k in range(5) for c in stream.batch(k).captions]
    assert sorted(said[:5]) == sorted(said[5:]) == sorted(["one", "two", "three", "four", "five"])
    again = source.open(context(lab.fresh("unet", 1), seed=s, batch=2)).batch(3)
    assert again.captions == stream.batch(3).captions and again.examples.tolist() == [6, 7]
    with pytest.raises(UserError, match="no such file"):
        parts.build({"data.captions": {"path": str(tmp_path / "no.txt")}}).read()
    with pytest.raises(UserError, match="at least one"):
        parts.build("data.captions").read()
