"""Context, taps and patches: seen where declared, gone afterwards, and the same gradients with and without checkpointing."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from temperament.errors import UserError
from temperament.nn.context import Address, Context, carry, checkpoint, checkpointing, context, current
from temperament.nn.places import Places
from temperament.nn.taps import patch, taps

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import MODELS

TAPPED = ["llama", "gpt2", "t5", "whisper", "clip", "llava", "unet", "sd3", "flux"]


def run(name, model):
    return MODELS[name].output(model(**MODELS[name].inputs()))


def hooks(model) -> int:
    """Hooks of ours (transformers installs some of its own on the first forward, and to checkpoint)."""
    every = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(h.__module__.startswith("temperament") for h in every)


# --- context ---------------------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """y = (1 + time) * tanh(W x) * (1 + gain * stream), and it writes the stream: everything a module may do with a context."""

    def __init__(self, width: int):
        super().__init__()
        self.map = nn.Linear(width, width)

    def forward(self, x):
        now = current()
        y = torch.tanh(self.map(x)) * (1 + now.need("time"))[:, None]
        y = y * (1 + now.streams.get("carried", torch.zeros(())) * now.need("gain"))
        now.streams["carried"] = y.mean(0, keepdim=True) + now.streams.get("carried", 0.0)
        return y


def gradients(blocks, x, checked: bool, seed=0):
    for b in blocks:
        b.zero_grad()
    time = torch.linspace(0, 1, len(x))
    with context(time=time, conditions={"gain": 0.5}, draws=Address(seed, "test", 3, torch.zeros(0, dtype=torch.long))):
        h = x
        for b in blocks:
            h = checkpoint(b, h) if checked else b(h)
    loss = (h**2).sum()  # backward after the `with` has ended
    loss.backward()
    return [p.grad.clone() for b in blocks for p in b.parameters()]


def test_checkpointing_carries_the_context():
    torch.manual_seed(0)
    blocks = [Reader(5) for _ in range(4)]
    x = torch.randn(3, 5, requires_grad=True)
    for a, b in zip(gradients(blocks, x, False), gradients(blocks, x, True), strict=True):
        assert torch.equal(a, b)
    assert current() == Context() and not current().streams


def test_checkpointing_without_carrying_is_noticed():
    block, x = Reader(5), torch.randn(3, 5, requires_grad=True)
    with context(time=torch.ones(3), conditions={"gain": 1.0}):
        y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    with pytest.raises(UserError, match="time"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit", "clip", "unet"])
def test_checkpointing_of_whole_models(name):
    """A module inside a foreign model reads the context and is patched; gradients with and without checkpointing are equal."""
    grads = []
    for checked in (False, True):
        model = MODELS[name].build().train()
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        if checked:
            checkpointing(model)
        down = Places.of({"m": model}).role("down")
        scale = lambda h, at: h * current().need("strength") + at.call
        with context(conditions={"strength": 1.5}), patch({"m": model}, down, scale):
            out = run(name, model)
        assert hooks(model) == 0
        out.square().mean().backward()
        assert hooks(model) == 0
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        plain = MODELS[name].build().train()
    assert grads[0].keys() == grads[1].keys()
    for n, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][n], rtol=1e-6, atol=1e-7)
    run(name, plain.eval()).square().mean().backward()
    assert not torch.equal(grads[0][n], dict(plain.named_parameters())[n].grad)  # and the patch did something


def test_contexts_nest_and_select_rows():
    with context(ids=[7, 8, 9], time=torch.arange(3.0), conditions={"a": torch.eye(3), "b": 1}) as outer:
        with context(time=torch.zeros(3), conditions={"b": 2}) as inner:
            assert current() is inner and inner.ids == [7, 8, 9] and inner.conditions["b"] == 2 and "a" in inner.conditions
            inner.streams["s"] = 1
        assert current() is outer and outer.streams == {"s": 1} and outer.conditions["b"] == 1
        some = outer.rows(torch.tensor([2, 0]))
        assert some.ids == [9, 7] and some.time.tolist() == [2.0, 0.0] and some.conditions["a"].shape == (2, 3)
        seen = []
        thread = threading.Thread(target=lambda: seen.append(current().ids))
        thread.start()
        thread.join()
        assert seen == [None]  # a new thread starts without
    assert current().ids is None
    with pytest.raises(UserError, match="conditions"):
        context(colour="red")
    with pytest.raises(UserError, match="run inside"):
        current().need("time")


def test_carry_outside_of_any_context_changes_nothing():
    forward, recompute = carry()
    with forward, recompute:
        assert current() == Context()


# --- taps ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TAPPED)
def test_taps_are_what_the_modules_saw_and_leave_nothing(name):
    model = MODELS[name].build()
    components = {"m": model}
    places = Places.of(components)
    chosen = places.category("attention").only(lambda p: p.kind in ("linear", "conv1d") and p.depth is not None)
    bare = run(name, model)
    with taps(components, chosen, at="input") as x, taps(components, chosen, at="output") as y:
        out = run(name, model)
    assert torch.equal(bare, out) and hooks(model) == 0
    for p in chosen:
        assert len(x.calls(p)) == len(y.calls(p)) >= 1
        expected = x[p] @ p.matrix().T + (p.bias if p.bias is not None else 0)
        torch.testing.assert_close(y[p], expected, rtol=1e-4, atol=1e-5)
        assert not x[p].requires_grad


@pytest.mark.parametrize("name", TAPPED)
def test_blocks_can_be_tapped_and_patched(name):
    model = MODELS[name].build()
    blocks = Places.of({"m": model}).blocks()
    bare = run(name, model)
    with taps({"m": model}, blocks) as t:
        run(name, model)
    assert all(len(t.calls(b)) == 1 for b in blocks)
    with patch({"m": model}, blocks, lambda h, at: h):
        assert torch.equal(run(name, model), bare)
    with patch({"m": model}, blocks, lambda h, at: h + 0):
        assert torch.equal(run(name, model), bare)
    with patch({"m": model}, blocks, lambda h, at: h * 0 + t[at.name]):  # its own states put back
        torch.testing.assert_close(run(name, model), bare)
    for side in ("input", "output"):  # multiplied by a changing factor, which no norm undoes
        with patch({"m": model}, blocks[-1], lambda h, at: h * torch.arange(1.0, h.shape[-1] + 1), at=side):
            assert not torch.allclose(run(name, model), bare)
    assert torch.equal(run(name, model), bare) and hooks(model) == 0


def test_taps_count_calls_keep_graphs_and_reduce():
    model = MODELS["llama"].build()
    inputs = MODELS["llama"].inputs()
    with taps(model, "mlp.down_proj", grad=True, keep=lambda h: h[:, -1]) as t:
        model(**inputs)
        second = model(**inputs).logits
    assert len(t) == 4 and [at.call for at, _ in t] == [0, 1, 0, 1]
    name = "lm/model.layers.1.mlp.down_proj"
    assert torch.equal(t[name, 0], t[name]) and t[name].shape == (2, 32) and t["model.layers.1.mlp.down_proj"] is t[name]
    (gradient,) = torch.autograd.grad(second.sum(), t["lm/model.layers.0.mlp.down_proj"], allow_unused=True)
    assert gradient is None  # a slice beside the path: not part of it
    with taps(model, "mlp.down_proj", grad=True) as t:
        out = model(**inputs).logits
    assert torch.autograd.grad(out.sum(), t["lm/model.layers.0.mlp.down_proj"])[0].abs().sum() > 0
    with pytest.raises(UserError, match="called 1 times"):
        t[name, 1]
    with pytest.raises(UserError, match="down_proj"):
        t["lm/model.layers.1.mlp.down_prj"]
    with pytest.raises(UserError, match="never called"), taps(MODELS["mixtral"].build(), ["experts.down_proj"]):
        pass


def test_nesting_and_exceptions():
    model = MODELS["llama"].build()
    bare = run("llama", model)
    plus = lambda h, at: h + 1
    twice = lambda h, at: h * 2
    norm = "model.norm"
    with patch(model, norm, plus), taps(model, norm) as between, patch(model, norm, twice), taps(model, norm) as last:
        run("llama", model)
    with taps(model, "model.norm") as first:
        run("llama", model)
    assert torch.equal(between["model.norm"], first["model.norm"] + 1)  # outer first
    assert torch.equal(last["model.norm"], (first["model.norm"] + 1) * 2)

    def fail(h, at):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError), patch(model, "model.norm", fail):
        run("llama", model)
    assert hooks(model) == 0 and current() == Context() and torch.equal(run("llama", model), bare)


def test_taps_do_not_collect_recomputation():
    model = MODELS["llama"].build().train()
    checkpointing(model)
    with taps(model, "q") as t:  # early in the block: what is needed last is not recomputed anyway
        out = run("llama", model)
        out.sum().backward()
    assert len(t.names) == 2 and all(len(t.calls(n)) == 1 for n in t.names)
    assert hooks(model) == 0


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_joint_block_gives_its_image_stream(name):
    """Also when text and image have equally many positions, where shapes cannot tell them apart."""
    model, inputs = MODELS[name].build(), MODELS[name].inputs()
    inputs["encoder_hidden_states"] = torch.randn(2, 16, 24)
    if name == "flux":
        inputs["txt_ids"] = torch.zeros(16, 3)
    block = Places.of({"m": model}).blocks()[0]
    with taps({"m": model}, block) as whole, patch({"m": model}, block, lambda h, at: h * 0):
        out = model(**inputs).sample
    assert whole[block].shape == (2, 16, 32)
    with patch({"m": model}, block, lambda h, at: h * 0), taps({"m": model}, block) as image:
        again = model(**inputs).sample
    assert not image[block].any() and torch.equal(out, again)
    raw = []
    handle = block.module.register_forward_hook(lambda m, i, o: raw.append(o))
    model(**inputs)
    handle.remove()
    assert torch.equal(raw[0][1], whole[block])  # (text, image)


def test_a_piece_of_a_state_is_a_copy():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(3, 3)

        def forward(self, x):
            return self.map(x).mul_(0)  # in place, after the tap

    model, x = Twice(), torch.randn(2, 5, 3)
    with torch.no_grad(), taps(model, "map", keep=lambda h: h[:, -1]) as t:
        model(x)
        assert torch.equal(t["map"], model.map(x)[:, -1])
    assert t["map"].untyped_storage().nbytes() == t["map"].nbytes
