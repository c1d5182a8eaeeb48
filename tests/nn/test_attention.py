"""Attention edits on every architecture: identity is bitwise; each edit equals what it means, computed another way."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from temperament.errors import UserError
from temperament.nn.attention import Edit, Extra, attend, sites_at
from temperament.nn.context import checkpointing, current
from temperament.nn.places import Places
from temperament.nn.taps import taps

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import MODELS

ALL = [name for name in MODELS if name != "resnet"]  # it attends to nothing
OPEN = [n for n in ALL if n != "bloom"]
CAUSAL = ["llama", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt_neox", "mixtral"]


def run(name, model, **more):
    with torch.no_grad():
        return MODELS[name].output(model(**{**MODELS[name].inputs(), **more}))


def everywhere(model):
    return Places.of({"m": model}).only(lambda p: p.attention and p.depth is not None)


def untouched(model) -> bool:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return not ALL_ATTENTION_FUNCTIONS._local_mapping and not any("forward" in m.__dict__ for m in model.modules())


def same(*args):
    return args[0] if len(args) == 2 else args[:3]


IDENTITY = [Edit(), Edit(qkv=same), Edit(heads=same), Edit(qkv=same, heads=same), Edit(temperature=1.0),
            Edit(extra=lambda at: None, bias=lambda at: None)]


@pytest.mark.parametrize("name", ALL)
def test_identity_is_bitwise(name):
    model = MODELS[name].build()
    bare, where = run(name, model), everywhere(model)
    for edit in IDENTITY:
        if name == "bloom" and set(edit.asks) - {"heads"}:
            continue
        with attend({"m": model}, where, edit) as sites:
            assert torch.equal(run(name, model), bare), edit.asks
        assert untouched(model)
    expected = len({p.attention for p in where})
    assert len(sites) == expected >= 1 and torch.equal(run(name, model), bare)


@pytest.mark.parametrize("name", ALL)
def test_silencing_a_head_is_zeroing_its_columns_of_o(name):
    model = MODELS[name].build()
    places = everywhere(model)
    block = places.blocks()[-1]
    head = 2

    def silence(out, at):
        out = out.clone()
        out[:, :, head] = 0
        return out

    with attend({"m": model}, block, Edit(heads=silence)):
        edited = run(name, model)
    bare = run(name, model)
    with torch.no_grad():
        for p in Places.of({"m": model}):
            if p.role in ("o", "o_down") and (p.stack, p.depth) == block.key:
                p.matrix()[:, p.columns(head)] = 0
    torch.testing.assert_close(edited, run(name, model), atol=2e-6, rtol=1e-5)
    assert name == "unet" or not torch.allclose(edited, bare, atol=1e-6)


@pytest.mark.parametrize("name", OPEN)
def test_maps_are_probabilities_and_can_be_put_back(name):
    """Rows of every map sum to 1; map @ v is what the attention gave; a uniform map gives the mean of v."""
    model = MODELS[name].build()
    bare, where, maps, heads, values = run(name, model), everywhere(model), {}, {}, {}

    def keep(store):
        def function(x, at):
            store[at.site.name, at.call] = x
            return x
        return function

    def keep_v(q, k, v, at):
        values[at.site.name, at.call] = v
        return q, k, v

    with attend({"m": model}, where, Edit(map=keep(maps), heads=keep(heads), qkv=keep_v)):
        out = run(name, model)
    torch.testing.assert_close(out, bare, atol=1e-5, rtol=1e-4)
    for key, probs in maps.items():
        torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs.sum(-1)), atol=1e-5, rtol=0)
        v = values[key].repeat_interleave(probs.shape[1] // values[key].shape[1], dim=1)
        torch.testing.assert_close((probs @ v).transpose(1, 2), heads[key], atol=1e-5, rtol=1e-4)
    with attend({"m": model}, where, Edit(map=lambda p, at: maps[at.site.name, at.call].clone())):
        torch.testing.assert_close(run(name, model), bare, atol=1e-5, rtol=1e-4)
    uniform = lambda p, at: torch.full_like(p, 1 / p.shape[-1])
    means = {}
    with attend({"m": model}, where, Edit(map=uniform, qkv=keep_v, heads=keep(means))):
        run(name, model)
    for key, got in means.items():
        mean = values[key].mean(2).repeat_interleave(got.shape[2] // values[key].shape[1], dim=1)
        torch.testing.assert_close(got, mean[:, None].expand_as(got), atol=1e-5, rtol=1e-4)
    assert untouched(model)


@pytest.mark.parametrize("name", OPEN)
def test_extra_keys(name):
    """With a bias of -inf they are not there; without, they are as the formula says; a zero bias changes nothing."""
    model = MODELS[name].build()
    bare, where = run(name, model), everywhere(model)
    seen = {}

    def extra(bias):
        def function(at):
            rng = torch.Generator().manual_seed(5)
            shape = (1, at.query.shape[1] if at.site.kv_heads is None else at.site.kv_heads, 3, at.site.head_dim)
            return Extra(torch.randn(shape, generator=rng), torch.randn(shape, generator=rng), bias=bias)
        return function

    with attend({"m": model}, where, Edit(extra=extra(float("-inf")))):
        torch.testing.assert_close(run(name, model), bare, atol=1e-5, rtol=1e-4)
    with attend({"m": model}, where, Edit(bias=lambda at: 0.0)):
        torch.testing.assert_close(run(name, model), bare, atol=1e-5, rtol=1e-4)
    with attend({"m": model}, where, Edit(extra=extra(float("-inf")), map=lambda p, at: seen.setdefault(at.site.name, p))):
        run(name, model)
    assert all(not p[..., :3].any() for p in seen.values())
    with attend({"m": model}, where, Edit(extra=extra(1.5), map=lambda p, at: p)):
        by_map = run(name, model)
    with attend({"m": model}, where, Edit(extra=extra(1.5))):
        torch.testing.assert_close(run(name, model), by_map, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(by_map, bare, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in OPEN if n != "gemma2"])
def test_bias_and_temperature_are_the_formula(name):
    """Log-probabilities of the map move by the bias, and scale with 1 / temperature, up to their normalisation."""
    model = MODELS[name].build()
    where = everywhere(model)
    first = sites_at({"m": model}, where)[0].name
    if name == "t5":
        with torch.no_grad():  # its position bias is no part of q k^T
            for p in Places.of({"m": model}).role("position"):
                p.weight.zero_()

    def log_map(edit):
        caught = {}
        with attend({"m": model}, first, Edit(**edit, map=lambda p, at: caught.setdefault(at.call, p))):
            run(name, model)
        return caught[0].clamp_min(1e-38).log()

    plain = log_map({})
    shape = plain.shape[-2:]
    bias = torch.randn(4, *shape, generator=torch.Generator().manual_seed(3))
    allowed = plain > -60
    wanted = F.log_softmax((plain + bias).masked_fill(~allowed, -1e30), -1)
    torch.testing.assert_close(log_map({"bias": lambda at: bias})[allowed], wanted[allowed], atol=1e-4, rtol=1e-4)
    wanted = F.log_softmax((plain / 1.7).masked_fill(~allowed, -1e30), -1)
    torch.testing.assert_close(log_map({"temperature": 1.7})[allowed], wanted[allowed], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*CAUSAL, "llava"])
def test_a_prefix_of_extra_keys_is_a_prefix(name):
    """The keys and values of a prefix, given as extras at positions, are the same as the prefix itself."""
    model = MODELS[name].build()
    if name == "llava":
        model = nn.ModuleDict({"l": MODELS["llama"].build()})["l"]  # the language part alone is a Llama
    tokens = MODELS["llama"].inputs()["input_ids"] if name == "llava" else MODELS[name].inputs()["input_ids"]
    cut = 3
    places = Places.of({"m": model})
    whole, raw = {}, {}

    def keep(q, k, v, at):
        whole[at.site.name] = k[:, :, :cut], v[:, :, :cut]
        return q, k, v

    where = everywhere(model)
    with torch.no_grad(), attend({"m": model}, where, Edit(qkv=keep)):
        full = model(input_ids=tokens).logits
    positions = torch.arange(cut, tokens.shape[1])[None]
    # The windows of sliding attention look back 4: stay where the window does not cut, or give the bias that cuts.
    window = getattr(model.config, "sliding_window", None)

    def cutting(at):
        if not window or (getattr(at.site.module, "sliding_window", None) is None and name != "mistral"):
            return 0.0
        behind = positions[0][:, None] - torch.arange(cut)[None]
        return torch.zeros(behind.shape).masked_fill(behind >= window, float("-inf"))

    extra = lambda at: Extra(*whole[at.site.name], bias=cutting(at))
    with torch.no_grad(), attend({"m": model}, where, Edit(extra=extra)):
        suffix = model(input_ids=tokens[:, cut:], position_ids=positions).logits
    torch.testing.assert_close(suffix, full[:, cut:], atol=1e-4, rtol=1e-4)

    # The same with keys as projected, turned to their positions by us.
    site = sites_at({"m": model}, places.blocks()[0])[0]
    if places.role("k", fused=False) and not places.role("k_norm"):
        with taps({"m": model}, places.role("k")) as t:
            model(input_ids=tokens)
        key = next(iter(places.role("k")))
        raw[site.name] = t[key][:, :cut].unflatten(-1, (site.kv_heads, site.head_dim)).transpose(1, 2)
        turned = lambda at: Extra(raw[at.site.name], whole[at.site.name][1], torch.arange(cut), bias=cutting(at)) \
            if at.site.name in raw else extra(at)
        with torch.no_grad(), attend({"m": model}, where, Edit(extra=turned)):
            again = model(input_ids=tokens[:, cut:], position_ids=positions).logits
        torch.testing.assert_close(again, full[:, cut:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "unet"])
def test_edits_under_checkpointing_have_the_same_gradients(name):
    grads = []
    for checked in (False, True):
        model = MODELS[name].build().train()
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        if checked:
            checkpointing(model)
        edit = Edit(heads=lambda o, at: o * (2.0 + at.call), bias=lambda at: at.site.depth * 0.1, map=lambda p, at: p * 0.9)
        with attend({"m": model}, everywhere(model), edit):
            out = MODELS[name].output(model(**MODELS[name].inputs()))
        assert untouched(model)
        out.square().mean().backward()  # recomputes after the edit is gone
        assert untouched(model)
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for n in grads[0]:
        torch.testing.assert_close(grads[0][n], grads[1][n], rtol=1e-6, atol=1e-7)


def test_nesting_order_and_exceptions():
    model = MODELS["llama"].build()
    bare = run("llama", model)
    first, second = "model.layers.0.self_attn", "model.layers.1"
    order = []
    note = lambda tag: Edit(heads=lambda o, at: (order.append((tag, at.site.name, at.call)), o)[1])
    with attend(model, first, note("a")), attend(model, [first, second + ".self_attn"], note("b")):
        run("llama", model)
        run("llama", model)
    layer = lambda i: f"lm/model.layers.{i}.self_attn"
    assert order == [(tag, layer(i), c) for c in (0, 1) for tag, i in (("a", 0), ("b", 0), ("b", 1))]
    with attend(model, first, Edit(heads=lambda o, at: o * 2)), attend(model, first, Edit(heads=lambda o, at: o / 2)):
        assert torch.equal(run("llama", model), bare)

    def fail(o, at):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError), attend(model, "q", Edit(heads=fail)):
        run("llama", model)
    assert untouched(model) and not current().active and torch.equal(run("llama", model), bare)


def test_what_cannot_be_is_said():
    bloom = MODELS["bloom"].build()
    with pytest.raises(UserError, match="by hand"), attend(bloom, "attention", Edit(map=same)):
        pass
    with pytest.raises(UserError, match="no attention"), attend(MODELS["llama"].build(), "mlp", Edit()):
        pass
    with pytest.raises(UserError, match="attention"), attend(MODELS["llama"].build(), "atention", Edit()):
        pass
    model = MODELS["gpt2"].build()
    where = lambda at: Extra(torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8), positions=torch.arange(1))
    with pytest.raises(UserError, match="no rotary"), attend(model, "attention", Edit(extra=where)):
        run("gpt2", model)


def test_an_attention_of_ones_own():
    """No library: any module that calls scaled_dot_product_attention."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
            self.num_heads = 2

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    net = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attn": Attention(), "norm": nn.LayerNorm(8)})])})
    x = torch.randn(2, 5, 8)
    bare, maps = net["blocks"][0]["attn"](x), []
    with attend(net, "attention", Edit(map=lambda p, at: (maps.append(p), p)[1])):
        torch.testing.assert_close(net["blocks"][0]["attn"](x), bare)
    assert torch.equal(maps[0].triu(1), torch.zeros_like(maps[0])) and not any("forward" in m.__dict__ for m in net.modules())
