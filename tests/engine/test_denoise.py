"""The denoising loop against diffusers' own schedulers, and rows against their company."""

import pytest
import torch

from temperament.bases import train_diffusion as lab
from temperament.engine.denoise import Denoiser, Hook, Sampler, _undone, covered, denoise, invert, logp, move
from temperament.engine.noise import Diffusion, Flow, process_of
from temperament.errors import UserError
from temperament.methods.adapters.lora import LoRA
from temperament.nn.batch import Images
from temperament.nn.context import context
from temperament.nn.draws import Address
from temperament.train.live import Live
from tests.train.rows import context as context_of

diffusers = pytest.importorskip("diffusers")
DIFFUSION = lab.SCHEDULERS["unet"]
PREDICTS = ("epsilon", "v_prediction", "sample")


@pytest.fixture(scope="module", params=["unet", "flow"])
def base(request):
    return lab.fresh(request.param, 3)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_one_step_is_that_of_diffusers(predicts, eta):
    theirs = diffusers.DDIMScheduler.from_config({**DIFFUSION, "prediction_type": predicts})
    theirs.set_timesteps(8)
    ours = process_of(theirs)
    assert ours.grid(8)[:-1].tolist() == theirs.timesteps.tolist()
    x, out, noise = torch.randn(3, 2, 3, 4, 4)
    for i in (0, 3, 5):
        now, then = ours.grid(8)[i : i + 2]
        want = theirs.step(out, int(now), x, eta=eta, variance_noise=noise if eta else None).prev_sample
        mean, spread = move(ours, x, ours.clean(out, x, now.expand(2)), now, then, eta)
        torch.testing.assert_close(mean + spread * noise, want, rtol=2e-4, atol=2e-4)


def test_a_flow_takes_steps_of_euler():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    ours, (x, out) = process_of(theirs), torch.randn(2, 2, 3, 4, 4)
    now, then = ours.grid(5)[1:3]
    mean, spread = move(ours, x, ours.clean(out, x, now.expand(2)), now, then, 0.0)
    torch.testing.assert_close(mean, x + (then - now) * out, rtol=1e-5, atol=1e-5)
    assert spread == 0 and ours.asked(now) == 800


def test_a_consistency_model_is_that_of_diffusers():
    theirs = diffusers.LCMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False)
    ours, (x, out) = process_of(theirs), torch.randn(2, 2, 3, 4, 4)
    theirs.set_timesteps(4)
    for t in (int(theirs.timesteps[0]), 3):
        theirs._step_index = None
        theirs.timesteps[0] = t
        want = theirs.step(out, t, x).denoised
        torch.testing.assert_close(ours.clean(out, x, torch.full((2,), float(t))), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.clean(out, x, torch.zeros(2)), x)  # the boundary: at time 0 it is what it is given


@pytest.mark.parametrize(
    "process", [process_of(DIFFUSION), process_of({**DIFFUSION, "prediction_type": "v_prediction"}), Flow()]
)
def test_what_it_should_say_is_what_shows_the_picture(process):
    x, n = torch.randn(2, 5, 3, 4, 4)
    t = process.times(torch.rand(5)).clamp(max=0.95 if isinstance(process, Flow) else 900)
    a, s = (v.view(-1, 1, 1, 1) for v in process.scales(t))
    torch.testing.assert_close(process.clean(process.target(x, n, t), a * x + s * n, t), x, rtol=1e-3, atol=2e-3)


def test_times_between_whole_ones_are_found_again():
    process = process_of(DIFFUSION)
    assert isinstance(process, Diffusion)
    t = torch.rand(20) * 990
    a, s = process.scales(t)
    torch.testing.assert_close(process.at(s / a), t.double(), rtol=1e-3, atol=0.05)


def test_a_row_is_painted_alike_in_any_company(base):
    captions = [
        "a red cross at the top left on navy",
        "a blue disc at the top right on black",
        "a white bar at the top left on grey",
    ]
    how = Sampler(3, 1.0, 2.0)
    together = denoise(base, captions, how, seed=5)
    for i, caption in enumerate(captions):
        alone = denoise(base, [caption], how, seed=5, ids=torch.tensor([i]))
        torch.testing.assert_close(alone.latents[0], together.latents[i], rtol=1e-4, atol=1e-3)


def test_rows_under_noise_do_not_know_their_company(base):
    pixels, ids = torch.rand(6, 3, 16, 16), torch.randint(0, 10**6, (6,))
    whole = Images(pixels, ids, captions=["a"] * 6)
    row, part = covered(Denoiser.of(base), whole, 1, 0.5), covered(Denoiser.of(base), whole.select([4, 1]), 1, 0.5)
    assert torch.equal(row.x[[4, 1]], part.x) and torch.equal(row.t[[4, 1]], part.t)
    assert [row.captions[i] for i in (4, 1)] == part.captions


def test_the_chain_says_how_likely_it_was(base):
    """Against the density written out: the mean over entries of a normal around the mean of the step."""
    made = denoise(base, ["a red cross"] * 2, Sampler(4, 1.0, 1.0), seed=1, record=True)
    chain = made.chain
    assert chain.weights.tolist() == [[1, 1, 1, 0]] * 2
    got = logp(base, chain)
    denoiser = Denoiser.of(base)
    with torch.no_grad():
        x, (now, then) = chain.before[:, 1], chain.times[0, 1]
        clean = denoiser.clean(x, now.expand(2), denoiser.encode(chain.captions))
        mean, spread = move(denoiser.process, x, clean, now, then, 1.0)
        want = torch.distributions.Normal(mean, spread).log_prob(chain.decisions[:, 1]).flatten(1).mean(1)
    torch.testing.assert_close(got[:, 1], want, rtol=1e-4, atol=1e-4)
    assert (got[:, 3] == 0).all()
    torch.testing.assert_close(made.logp, got.detach(), rtol=1e-4, atol=1e-4)  # as it was when it was drawn


def test_only_the_last_steps_keep_their_graph(base):
    """A gradient through the last step alone is that of the loop entered there; recomputing changes nothing."""
    params = list(base.components["denoiser"].parameters())

    def gradient(**how):
        made = denoise(base, ["a red cross"], Sampler(3, 0.0, 1.0), seed=2, **how)
        return torch.autograd.grad(made.pixels.square().sum(), params, allow_unused=True)

    full, again, last = gradient(keep=3), gradient(keep=3, checkpoint=True), gradient(keep=1)
    for a, b in zip(full, again, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-6))
    assert any(a is not None and not torch.allclose(a, c) for a, c in zip(full, last, strict=True))
    x = denoise(base, ["a red cross"], Sampler(3, 0.0, 1.0), seed=2, hooks=[keeper := _Keeper()]) and keeper.x
    denoiser = Denoiser.of(base)
    now, then = denoiser.process.grid(3)[2:4]
    clean = denoiser.clean(x, now.expand(1), denoiser.encode(["a red cross"]))
    pixels = denoiser.pixels(move(denoiser.process, x, clean, now, then, 0.0)[0])
    want = torch.autograd.grad(pixels.square().sum(), params, allow_unused=True)
    for a, b in zip(last, want, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-6))


class _Keeper(Hook):
    def estimated(self, state):
        self.x = state.before.clone()


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_a_path_is_walked_back(predicts):
    """Sampled, undone, sampled again; and unrefined, one step back is that of diffusers."""
    base = lab.fresh("unet", 4)
    base.processors["scheduler"] = config = {**DIFFUSION, "prediction_type": predicts}
    made = denoise(base, [""] * 2, Sampler(4, 0.0, 1.0), seed=6)
    start = invert(base, made.latents, steps=4, refine=12)
    again = denoise(base, [""] * 2, Sampler(4, 0.0, 1.0), start=start)
    torch.testing.assert_close(again.latents, made.latents, rtol=1e-2, atol=5e-3)
    if predicts == "epsilon":
        theirs = diffusers.DDIMInverseScheduler.from_config({**config, "timestep_spacing": "trailing"})
        theirs.set_timesteps(4)
        x, denoiser = torch.randn(2, 3, 16, 16), Denoiser.of(base)
        back, times = [], denoiser.process.grid(4)
        with torch.no_grad():
            read = denoiser.encode([""] * 2)
            want = theirs.step(denoiser(x, times[1].expand(2), read), int(times[1]), x).prev_sample
        got = _undone(denoiser, x, times[1], times[2], read, 0)
        torch.testing.assert_close(got.detach(), want, rtol=1e-4, atol=1e-4)
        invert(base, x, steps=4, tell=back.append)
        assert back == [3, 2, 1, 0]


@pytest.mark.parametrize("process", [*(process_of({**DIFFUSION, "prediction_type": p}) for p in PREDICTS), Flow()])
def test_a_step_is_undone(process):
    """Of a network that is a contraction, whatever it says: the step there and back."""

    class Contraction:
        def __call__(self, x, t, conditions):
            return 0.9 * torch.tanh(x) if getattr(process, "predicts", "") == "sample" else 0.1 * torch.sin(x)

    net, (x,) = Contraction(), torch.randn(1, 2, 3, 4, 4)
    net.process, times = process, process.grid(6)
    for i in (1, 3, 5):
        now, then = times[i : i + 2]
        after, _ = move(process, x, process.clean(net(x, now, {}), x, now.expand(2)), now, then, 0.0)
        back = _undone(net, after, now, then, {}, 200)
        again, _ = move(process, back, process.clean(net(back, now, {}), back, now.expand(2)), now, then, 0.0)
        torch.testing.assert_close(again, after, rtol=1e-3, atol=1e-3)


def test_a_flow_is_walked_back():
    base = lab.fresh("flow", 4)
    made = denoise(base, ["a red cross"], Sampler(3, 0.0, 1.0), seed=6)
    start = invert(base, made.latents, ["a red cross"], 3, refine=30)
    torch.testing.assert_close(start, Denoiser.of(base).process.start(_noise(1, 6)), rtol=1e-2, atol=1e-2)


def test_a_path_is_walked_back_without_dropout():
    base = lab.fresh("flow", 4)
    live = Live(base, [LoRA(rank=4, dropout=0.5).build(base, context_of(base))])
    for p in live.params.values():
        p.tensor.data.normal_(std=0.1)
    made = torch.randn(1, 3, 16, 16)
    quiet = invert(base, made, ["a red cross"], 3)
    with context(draws=Address(0, "forward", 0, torch.arange(1))):
        assert torch.equal(invert(base, made, ["a red cross"], 3), quiet)


@pytest.mark.parametrize("grid", [{"use_dynamic_shifting": True}, {"shift_terminal": 0.02}])
def test_a_flow_with_a_grid_of_its_own_is_refused(grid):
    flow = diffusers.FlowMatchEulerDiscreteScheduler
    assert process_of(flow(shift=3.0)) == Flow(3.0)
    with pytest.raises(UserError, match=next(iter(grid))):
        process_of(flow(**grid))


def _noise(rows, seed):
    from temperament.nn import draws

    return draws.normal(seed, "denoise/start", 0, torch.arange(rows), (3, 16, 16))


def test_rows_chosen_anew_take_their_past_along(base):
    class Swap(Hook):
        def estimated(self, state):
            if state.step == 2:
                state.select(torch.tensor([1, 1]))

    captions, how = ["a red cross", "a blue disc"], Sampler(4, 1.0, 2.0)
    plain = denoise(base, captions, how, seed=1, record=True).chain
    made = denoise(base, captions, how, seed=1, record=True, hooks=[Swap()])
    assert made.chain.captions == ["a blue disc"] * 2
    for row in (0, 1):
        assert torch.equal(made.chain.decisions[row, :2], plain.decisions[1, :2])
    torch.testing.assert_close(made.chain.decisions[1], plain.decisions[1], rtol=1e-4, atol=1e-4)
    assert not torch.equal(made.chain.decisions[0, 2], made.chain.decisions[1, 2])  # noise stays with the place
