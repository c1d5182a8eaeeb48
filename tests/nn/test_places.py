"""Every architecture: each parameter in exactly one place, the expected roles per block, fused rows that are what they say."""

from __future__ import annotations

import functools
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from temperament.errors import UserError
from temperament.nn.places import Places

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import MODELS

ALL = list(MODELS)
SEPARATE = {"q": 1, "k": 1, "v": 1, "o": 1}
GATED = {"gate": 1, "up": 1, "down": 1}
PLAIN = {"up": 1, "down": 1}
LLAMA = {**SEPARATE, **GATED, "norm": 2}
TOWER = {**SEPARATE, **PLAIN, "norm": 2}
CROSSED = {"q": 2, "k": 2, "v": 2, "o": 2, "norm": 3}

# Per stack: how many places of each role one block has (of the first block, where blocks differ).
EXPECTED: dict[str, dict[str, dict[str, int]]] = {
    **{key: {"decoder": LLAMA} for key in ("llama", "llama_tied", "qwen2", "mistral")},
    "qwen3": {"decoder": {**LLAMA, "q_norm": 1, "k_norm": 1}},
    "mixtral": {"decoder": {**SEPARATE, "router": 1, "gate_up": 1, "down": 1, "norm": 2}},
    "gemma2": {"decoder": {**LLAMA, "norm": 4}},
    "gemma3": {"decoder": {**LLAMA, "norm": 4, "q_norm": 1, "k_norm": 1}},
    "phi3": {"decoder": {"qkv": 1, "o": 1, "gate_up": 1, "down": 1, "norm": 2}},
    **{key: {"decoder": {"qkv": 1, "o": 1, **PLAIN, "norm": 2}} for key in ("gpt2", "gpt_neox", "bloom")},
    "opt": {"decoder": TOWER},
    "t5": {"encoder": {**LLAMA, "position": 1}, "decoder": {**CROSSED, **GATED, "position": 1}},
    **{key: {"encoder": TOWER} for key in ("bert", "roberta")},
    "vit": {"vision": TOWER},
    "resnet": {"vision": {"conv": 3, "norm": 3}},
    **{key: {"text": TOWER, "vision": TOWER} for key in ("clip", "siglip")},
    "ast": {"audio": TOWER},
    "whisper": {"encoder": TOWER, "decoder": {**CROSSED, **PLAIN}},
    "llava": {"vision": TOWER, "decoder": LLAMA},
    "qwen2_vl": {"vision": {"qkv": 1, "o": 1, **PLAIN, "norm": 2}, "decoder": LLAMA},
    "unet": {
        "down": {"q": 2, "k": 2, "v": 2, "o": 2, "gate_up": 1, "down": 1, "norm": 6, "conv": 5, "time": 1},
        "mid": {"q": 2, "k": 2, "v": 2, "o": 2, "gate_up": 1, "down": 1, "norm": 8, "conv": 6, "time": 2},
        "up": {"norm": 4, "conv": 7, "time": 2},
    },
    "dit": {"denoiser": {**SEPARATE, **PLAIN, "time": 2, "condition": 1, "modulation": 1}},
    "sd3": {"denoiser": {"q": 2, "k": 2, "v": 2, "o": 2, "up": 2, "down": 2, "q_norm": 2, "k_norm": 2, "modulation": 2}},
    "flux": {
        "denoiser": {"q": 2, "k": 2, "v": 2, "o": 2, "up": 2, "down": 2, "q_norm": 2, "k_norm": 2, "modulation": 2},
        "single": {"q": 1, "k": 1, "v": 1, "up": 1, "o_down": 1, "q_norm": 1, "k_norm": 1, "modulation": 1},
    },
}
OUTSIDE = {  # what lies before the first and after the last block
    "llama": ({"embed": 1}, {"norm": 1, "head": 1}),
    "gpt2": ({"embed": 1, "position": 1}, {"norm": 1, "head": 1}),
    "bloom": ({"embed": 1, "norm": 1}, {"norm": 1, "head": 1}),
    "opt": ({"embed": 1, "position": 1}, {"norm": 1, "head": 1}),
    "bert": ({"embed": 1, "position": 1, "type": 1, "norm": 1}, {"head": 3, "norm": 1}),
    "resnet": ({"conv": 1, "norm": 1}, {"head": 1}),
    "vit": ({"token": 1, "position": 1, "patch": 1}, {"norm": 1, "head": 1}),
    "ast": ({"token": 2, "position": 1, "patch": 1}, {"norm": 2, "head": 1}),
    "clip": ({"embed": 1, "position": 2, "token": 1, "patch": 1, "norm": 1}, {"norm": 2, "head": 2, "scale": 1}),
    "siglip": ({"embed": 1, "position": 2, "token": 1, "patch": 1},
               {"norm": 3, "head": 1, "scale": 2, "qkv": 1, "o": 1, "up": 1, "down": 1}),
    "whisper": ({"conv": 2, "position": 2, "embed": 1}, {"norm": 2, "head": 1}),
    "llava": ({"token": 1, "patch": 1, "position": 1, "norm": 1, "embed": 1}, {"norm": 2, "projector": 2, "head": 1}),
    "qwen2_vl": ({"patch": 1, "embed": 1}, {"norm": 2, "projector": 2, "head": 1}),
    "unet": ({"conv": 1, "time": 2}, {"norm": 1, "head": 1}),
    "dit": ({"patch": 1}, {"modulation": 1, "head": 1}),
    "sd3": ({"patch": 1, "time": 2, "condition": 3}, {"modulation": 1, "head": 1}),
    "flux": ({"patch": 1, "time": 2, "condition": 3}, {"modulation": 1, "head": 1}),
}


@functools.cache
def model_of(name: str) -> nn.Module:
    return MODELS[name].build()


@functools.cache
def places_of(name: str) -> Places:
    return Places.of({"m": model_of(name)})


@pytest.mark.parametrize("name", ALL)
def test_partition(name):
    """Every parameter is in exactly one place, by name; every tensor under one name; and every place can reach its own."""
    model, places = model_of(name), places_of(name)
    listed = [full for p in places for full in p.parameters.values()]
    assert len(listed) == len(set(listed))
    assert set(listed) == {f"m/{k}" for k, _ in model.named_parameters(remove_duplicate=False)}
    assert list(places.parameters()) == [f for f in places.parameters(tied=True) if f in places.parameters()]
    assert sum(p.parameter(w).numel() for p, w in places.parameters().values()) == sum(p.numel() for p in model.parameters())
    for p in places:
        for which, full in p.parameters.items():
            assert p.parameter(which) is model.get_parameter(full.removeprefix("m/"))
        assert p.role != "other", p
        assert tuple(p.matrix().shape) == p.shape


@pytest.mark.parametrize("name", ALL)
def test_roles_per_block(name):
    places = places_of(name)
    blocks = places.blocks()
    assert [b.key for b in blocks] == [(s, d) for s, n in MODELS[name].blocks for d in range(n)]
    assert [b.number for b in blocks] == list(range(len(blocks)))
    for stack, expected in EXPECTED[name].items():
        first = next(b for b in blocks if b.stack == stack)
        assert Counter(p.role for p in first.places) == expected, (stack, [(p.path, p.role) for p in first.places])
        assert all(p.path.startswith(first.name.removeprefix("m/")) for p in first.places)


@pytest.mark.parametrize("name", list(OUTSIDE))
def test_roles_outside_blocks(name):
    for side, expected in zip(("before", "after"), OUTSIDE[name], strict=True):
        found = [p for p in places_of(name) if p.where == side]
        assert Counter(p.role for p in found) == expected, [(p.path, p.role) for p in found]


@pytest.mark.parametrize("name", ALL)
def test_heads(name):
    """heads x head_dim is what o reads and q writes; kv_heads x head_dim is what k and v write."""
    for p in places_of(name).category("attention"):
        assert p.heads == 4, p
        width = {"q": p.heads, "o": p.heads, "k": p.kv_heads, "v": p.kv_heads}.get(p.role)
        if width is not None:
            assert p.shape[1 if p.role == "o" else 0] == width * p.head_dim, p


def test_cross_attention():
    for name, count in (("t5", 8), ("whisper", 8), ("unet", 16)):  # UNet: down 1, mid 1, up 2 cross-attentions
        cross = [p for p in places_of(name) if p.cross]
        assert len(cross) == count and {p.role for p in cross} == {"q", "k", "v", "o"}
    assert not any(p.cross for name in ("llama", "gpt2", "sd3", "dit", "bert", "clip") for p in places_of(name))
    for name in ("sd3", "flux"):
        assert {p.role for p in places_of(name) if p.stream == "context" and p.category == "attention"} == {"q", "k", "v", "o"}


def test_ties():
    assert places_of("llama_tied").tied() == [("m/model.embed_tokens.weight", "m/lm_head.weight")]
    assert places_of("llama_tied")["m/lm_head"].tied_to == "m/model.embed_tokens"
    assert places_of("llama").tied() == []
    assert ("m/cls.predictions.bias", "m/cls.predictions.decoder.bias") in places_of("bert").tied()
    assert len(places_of("llama_tied").parameters()) + 1 == len(places_of("llama_tied").parameters(tied=True))


def test_two_components_share_tensors_and_keep_their_names():
    a, b = MODELS["llama_tied"].build(), MODELS["vit"].build()
    places = Places.of({"lm": a, "image_encoder": b})
    assert {p.component for p in places} == {"lm", "image_encoder"}
    assert [(x.component, x.depth) for x in places.blocks()] == [(c, d) for c in ("lm", "image_encoder") for d in (0, 1)]
    assert places.depth_of("image_encoder/vit.layers.1.mlp.fc1.bias").number == 3


# --- fused weights ---------------------------------------------------------------------------------------------------------


def _eager_qkv(model, inputs, monkeypatch):
    """q, k, v as the attention sees them, of every call (caught at the softmax-attention itself)."""
    seen = []
    real = nn.functional.scaled_dot_product_attention

    def spy(q, k, v, *args, **kwargs):
        seen.append({"q": q.detach().clone(), "k": k.detach().clone(), "v": v.detach().clone()})
        return real(q, k, v, *args, **kwargs)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        model(**inputs)
    return seen


@pytest.mark.parametrize("name", ["phi3", "gpt2", "gpt_neox", "qwen2_vl"])
@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_rows_of_fused_qkv(name, role, monkeypatch):
    """Changing the rows of one role (of one head) changes that role (that head) in the attention, and nothing else."""
    model, inputs = MODELS[name].build(), MODELS[name].inputs()
    place = next(p for p in Places.of({"m": model}) if p.role == "qkv")
    before = _eager_qkv(model, inputs, monkeypatch)[0]
    head = 1
    with torch.no_grad():
        place.matrix()[place.rows(role, head=head)] += 0.5
    after = _eager_qkv(model, inputs, monkeypatch)[0]
    for r in "qkv":
        changed = [h for h in range(before[r].shape[1]) if not torch.equal(before[r][:, h], after[r][:, h])]
        heads = place.heads if role == "q" else place.kv_heads
        repeats = before[r].shape[1] // heads  # the attention may repeat key heads
        assert changed == ([head * repeats + i for i in range(repeats)] if r == role else []), (r, changed)


@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_rows_of_bloom(role):
    """BLOOM has its own attention: compare with its own reshaping."""
    model = MODELS["bloom"].build()
    place = next(p for p in Places.of({"m": model}) if p.role == "qkv")
    attention = model.transformer.h[0].self_attention
    rows = torch.arange(96.0).view(1, 1, 96)
    parts = dict(zip("qkv", attention._reshape(rows), strict=True))
    assert torch.equal(parts[role].flatten().long(), place.rows(role))
    assert torch.equal(parts[role][0, 2, 0].long(), place.rows(role, head=2))


def test_rows_of_fused_gates():
    """With the gate rows held constant the gated product is linear in the up rows: doubling them doubles it."""
    for name in ("phi3", "unet", "mixtral"):
        model, inputs = MODELS[name].build(), MODELS[name].inputs()
        place = next(p for p in Places.of({"m": model}) if p.role == "gate_up")
        assert sorted(torch.cat([place.rows("gate"), place.rows("up")]).tolist()) == list(range(place.shape[-2]))
        wanted = "gate"
        with torch.no_grad():
            w = place.matrix()
            w[..., place.rows(wanted), :] = 0.0
            if place.bias is not None:
                place.bias[place.rows(wanted)] = 30.0  # gelu(30) = 30 exactly, so the block is linear in `up`
            out = _mlp_output(model, place, inputs)
            w[..., place.rows("up"), :] *= 2
            if place.bias is not None:
                place.bias[place.rows("up")] *= 2
            double = _mlp_output(model, place, inputs)
        torch.testing.assert_close(double, 2 * out, atol=1e-5, rtol=1e-5)
        if place.bias is None:  # silu(0) = 0
            assert not out.any()


def _mlp_output(model, place, inputs):
    """The input of the map after the gate (or the output of the experts)."""
    caught = []
    if place.experts:
        handle = place.module.register_forward_hook(lambda m, i, o: caught.append(o[0] if isinstance(o, tuple) else o))
    else:
        path = re.sub(r"gate_up_proj$", "down_proj", place.path).replace("net.0.proj", "net.2")
        handle = model.get_submodule(path).register_forward_hook(lambda m, i, o: caught.append(i[0]))
    model(**inputs)
    handle.remove()
    return caught[0].clone()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "opt", "flux"])
def test_columns_of_the_output_projection(name):
    """The columns of a head at o are those fed by the rows of that head at v: silence both ways, equal outputs."""
    outputs = []
    for side in ("rows", "columns"):
        model = MODELS[name].build()
        places = Places.of({"m": model})
        with torch.no_grad():
            for p in places:
                if p.role in ("v", "qkv") and side == "rows" and p.depth is not None and p.stack != "denoiser":
                    for h in {2 * p.kv_heads // p.heads}:
                        p.matrix()[p.rows("v", head=h)] = 0
                        if p.bias is not None:
                            p.bias[p.rows("v", head=h)] = 0
                if p.role in ("o", "o_down") and side == "columns" and p.depth is not None and p.stack != "denoiser":
                    for h in range(p.heads):
                        if h * p.kv_heads // p.heads == 2 * p.kv_heads // p.heads:
                            p.matrix()[:, p.columns(h)] = 0
            outputs.append(MODELS[name].output(model(**MODELS[name].inputs())))
    torch.testing.assert_close(*outputs, atol=2e-6, rtol=1e-5)


# --- choosing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in ALL if MODELS[n].needs == "transformers"])
def test_linear_is_what_peft_calls_all_linear(name):
    peft = pytest.importorskip("peft")
    model = MODELS[name].build()
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2)).base_model.model
    theirs = {n for n, m in tuned.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    # Theirs also takes maps outside blocks (heads, connectors) and the router of a mixture; these need be named here.
    mine = {p.path for p in places_of(name).linear()}
    inside = {p.path for p in places_of(name) if p.depth is not None and p.role != "router"}
    convolutions = {p.path for p in places_of(name) if p.kind == "conv" and p.depth is not None}  # where a network has no other
    assert mine == (theirs & inside or convolutions)


def test_match():
    places = places_of("llama")
    per_block = lambda found: len(found) / 2
    assert per_block(places.match("q")) == 1 and per_block(places.match(["q_proj", "v_proj"])) == 2
    assert per_block(places.match("attention")) == 4 and per_block(places.match("mlp")) == 3
    assert per_block(places.match("all-linear")) == 7 and len(places.match("all")) == len(places)
    assert places.match(r".*layers\.1\..*_proj").names == tuple(p.name for p in places.linear() if p.depth == 1)
    assert places.match("layers.0.mlp").names == tuple(p.name for p in places if p.depth == 0 and p.category == "mlp")
    assert places.match(["lm_head", "norm"]).names == tuple(p.name for p in places if p.role in ("head", "norm"))
    assert len(places_of("qwen3").match("norm")) == 9 and len(places_of("qwen3").role("norm")) == 5
    assert places.match("self_attn.q_proj").names == places.role("q").names


@pytest.mark.parametrize(("targets", "bad", "offer"), [
    (["q_proj", "vproj"], "vproj", "v_proj"), ("attentoin", "attentoin", "attention"), (["q", "qkv"], "qkv", "q"),
    ([r".*nothing.*"], ".*nothing.*", ""), (["mlp", "("], "(", "regular"), ("proj", "proj", "proj")])
def test_a_mistyped_target_is_an_error_even_among_others(targets, bad, offer):
    with pytest.raises(UserError) as error:
        places_of("llama").match(targets, field="adapter.targets")
    assert error.value.field == "adapter.targets" and error.value.value == bad and offer in str(error.value)
    assert str(error.value).count(". ") == 0


def test_asking_for_a_role_inside_a_fused_weight():
    places = places_of("gpt2")
    found = places.role("q", "v")
    assert [p.role for p in found] == ["qkv", "qkv"]
    place = next(iter(found))
    assert torch.equal(found.rows(place), torch.cat([torch.arange(32), torch.arange(64, 96)]))
    assert places.rows(place) is None and places.match("c_attn").rows(place) is None
    assert places.match(["q", "c_attn"]).rows(place) is None  # all of it was asked for by name
    assert torch.equal(places.match(["q", "k"]).rows(place), torch.arange(64))
    assert len(places.role("q", fused=False)) == 0
    assert found.only(lambda p: p.depth == 1).rows(found[found.names[1]]) is not None


def test_depth():
    places = places_of("whisper")
    depth = lambda n: tuple(places.depth_of("m/" + n))
    assert depth("model.encoder.conv1.weight") == ("encoder", -1, 2, -1, 4)
    assert depth("model.encoder.layers.1.fc1.bias") == ("encoder", 1, 2, 1, 4)
    assert depth("model.encoder.layer_norm.weight") == ("encoder", 2, 2, 2, 4)
    assert depth("model.decoder.layers.0.fc1.bias") == ("decoder", 0, 2, 2, 4)
    assert depth("proj_out.weight") == ("decoder", 2, 2, 4, 4)
    assert places.depth_of("m/model.decoder.layers.0.fc1").fraction == 0.0 and places.depth_of("m/proj_out").fraction == 1.0
    with pytest.raises(UserError, match="did you mean"):
        places.depth_of("m/model.encoder.layers.1.fc.bias")
    for name in ALL:  # every parameter has a depth, also from a filtered collection
        some = places_of(name).category("norm")
        for full in places_of(name).parameters(tied=True):
            found = some.depth_of(full)
            assert found.count >= 1 and -1 <= found.index <= found.count and 0 <= found.fraction <= 1


def test_a_plain_network():
    """No config, no library: the last map is the head, lists of composite modules are blocks under their own name."""
    block = lambda: nn.ModuleDict({"norm": nn.LayerNorm(4), "up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})
    net = nn.ModuleDict({"inp": nn.Linear(3, 4), "trunk": nn.ModuleList([block(), block()]), "out": nn.Linear(4, 2)})
    places = Places.of(net)
    assert [b.key for b in places.blocks()] == [("trunk", 0), ("trunk", 1)]
    assert places["model/out"].role == "head" and [p.role for p in places.linear()] == ["up", "down"] * 2
    policy = Places.of({"policy": nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))})
    assert [(p.name, p.role) for p in policy] == [("policy/0", "other"), ("policy/2", "head")]
    assert policy.linear().names == ("policy/0",)


def test_names_are_the_same_in_every_process():
    assert places_of("unet").names == Places.of({"m": MODELS["unet"].build(seed=3)}).names
