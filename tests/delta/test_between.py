"""between + apply gives the tuned checkpoint bit for bit, whatever holds either side."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from temperament.delta import Delta, Dense, Lazy, LowRank, Replace, Sparse, as_delta, between, identity, open_source, write_peft
from temperament.delta.tensorfile import write_tensors
from temperament.errors import UserError


def llama(tied=True, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tuned_of(model):
    """Every way a tensor can change: all of it, a few entries, by less than it can hold, not at all."""
    with torch.no_grad():
        for i, (_, p) in enumerate(model.named_parameters()):
            if i % 4 == 0:
                p.add_(torch.randn_like(p))
            elif i % 4 == 1:
                p.view(-1)[3] += 1e-3 * torch.rand(())
            elif i % 4 == 2:
                p.mul_(1e-8)
    return model


def as_folder(model, path, **options):
    model.save_pretrained(path, **options)
    return path


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def pair(request):
    return llama(request.param), tuned_of(llama(request.param))


KINDS = {
    "folder": lambda m, path: as_folder(m, path),
    "sharded": lambda m, path: as_folder(m, path, max_shard_size="3KB"),
    "module": lambda m, path: m,
    "state": lambda m, path: m.state_dict(),
    "components": lambda m, path: {"lm": m},
}


@pytest.mark.parametrize("tuned", sorted(KINDS))
@pytest.mark.parametrize("base", sorted(KINDS))
@pytest.mark.parametrize("lazy", [False, True])
def test_bit_for_bit(pair, tmp_path, base, tuned, lazy):
    a, b = KINDS[base](pair[0], tmp_path / "a"), KINDS[tuned](pair[1], tmp_path / "b")
    delta = between(a, b, lazy=lazy)
    assert delta.base == identity(pair[0]) == identity(a) and not delta.additions
    new = llama(pair[0].config.tie_word_embeddings)
    delta.apply(new)
    wanted = pair[1].state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in new.state_dict().items())
    assert identity(new) == identity(b)
    if not lazy:
        kinds = {type(c) for c in delta.changes.values()}
        assert kinds <= {Dense, Replace, Sparse} and Sparse in kinds
        assert len(delta.changes) < len(dict(pair[0].named_parameters()))
        plain = between(a, b, exact=False, identify=False)
        assert Replace not in {type(c) for c in plain.changes.values()} and not plain.base


def test_lazy_reads_nothing_first(tmp_path):
    a, b = as_folder(llama(), tmp_path / "a"), as_folder(llama(seed=1), tmp_path / "b")
    delta = between(a, b, lazy=True, identify=False)
    assert isinstance(delta.changes, Lazy)
    delta.save(tmp_path / "d")
    assert Delta.load(tmp_path / "d").digest == delta.digest


def test_half_precision_and_signs_of_zero():
    W = torch.randn(50, 4).bfloat16()
    tuned = {"w": W + torch.randn(50, 4).bfloat16() * 1e-2, "z": -torch.zeros(8), "wide": torch.randn(6).bfloat16()}
    base = {"w": W, "z": torch.zeros(8), "wide": torch.randn(6)}
    delta = between(base, tuned)
    new = delta.apply(base)
    assert all(torch.equal(new[k].view(torch.uint8), tuned[k].to(base[k].dtype).view(torch.uint8)) for k in base)
    with pytest.raises(UserError, match="exact"):
        between({"w": W}, {"w": W.float() + 1})
    assert torch.allclose(between({"w": W}, {"w": W.float() + 1}, exact=False).change("lm/w").delta(), torch.ones(50, 4))


def test_a_tied_head_stored_twice(tmp_path):
    model = llama(tied=True)
    once = as_folder(model, tmp_path / "once")
    twice = as_folder(model, tmp_path / "twice")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert "lm_head.weight" in state
    (twice / "model.safetensors").unlink()
    write_tensors(twice, state)
    assert open_source(twice).aliases == {"lm/lm_head.weight": "lm/model.embed_tokens.weight"}
    assert identity(once) == identity(twice) == identity(model)
    for a, b in ((once, twice), (twice, once)):
        assert not between(a, b).names
    (twice / "config.json").unlink()  # nothing says tied: the bytes do
    assert not between(twice, once).names and not between(once, twice).additions.keys() - {"lm/lm_head.weight"}
    untied = dict(state, **{"lm_head.weight": torch.randn_like(state["lm_head.weight"])})
    with pytest.raises(UserError, match="untie"):
        between(model, untied)


def test_refusals(tmp_path):
    base = {"w": torch.randn(5, 3), "b": torch.randn(3)}
    more_rows = dict(base, w=torch.randn(6, 3))
    for tuned, words in (
        (more_rows, "vocabulary"),
        (dict(base, b=torch.tensor([1.0, float("nan"), 0])), "finite"),
        ({"b": base["b"]}, "architecture"),
    ):
        with pytest.raises(UserError, match=words) as error:
            between(base, tuned)
        assert "lm/" in str(error.value)
    delta = between(base, dict(base, score=torch.ones(2)))
    assert list(delta.additions) == ["lm/score"] and torch.equal(delta.additions["lm/score"].tensors["value"], torch.ones(2))


def test_buffers_are_kept_apart():
    net = torch.nn.BatchNorm1d(4)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net(torch.randn(8, 4))
    for tuned in (net, net.state_dict()):
        delta = between(before, tuned)
        assert set(delta.buffers) == {"lm/running_mean", "lm/running_var", "lm/num_batches_tracked"} and not delta.changes
        new = delta.apply(before)
        assert all(torch.equal(new[k], v) for k, v in net.state_dict().items())


def test_identity_is_of_content(tmp_path):
    state = {"b": torch.randn(4), "a": torch.randn(3, 2)}
    one = identity(state)
    assert one == identity(dict(reversed(list(state.items()))))
    for size in (10, 10**9):
        (tmp_path / str(size)).mkdir()
        write_tensors(tmp_path / str(size), state, shard_bytes=size)
        assert identity(tmp_path / str(size)) == one
    for other in ({**state, "b": state["b"] + 1}, {"b": state["b"], "c": state["a"]}, {**state, "a": state["a"].view(2, 3)}):
        assert identity(other) != one
    assert identity({"x/a": state["a"], "y/b": state["b"]}).keys() == {"x", "y"}
    path = tmp_path / str(10**9) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert identity(path.parent) != one  # the cache sees the change
    assert json.loads(json.dumps(one)) == one


def test_whatever_a_user_points_at(tmp_path):
    base, tuned = llama(False), tuned_of(llama(False))
    as_folder(base, tmp_path / "base")
    as_folder(tuned, tmp_path / "tuned")
    q = "lm/model.layers.0.self_attn.q_proj.weight"
    lora = Delta({q: LowRank(torch.randn(2, 16), torch.randn(16, 2))})
    lora.save(tmp_path / "saved")
    write_peft(lora, tmp_path / "adapter")
    for what, wanted in (("tuned", tuned), ("saved", None), ("adapter", None)):
        got = as_delta(tmp_path / what, tmp_path / "base").apply(llama(False)).state_dict()
        wanted = (wanted or lora.apply(llama(False))).state_dict()
        assert all(torch.equal(got[k], v) for k, v in wanted.items())
    assert as_delta(lora, base) is lora
    with pytest.raises(UserError, match="adapter"):
        open_source(tmp_path / "adapter")
    assert Delta.load(tmp_path / "adapter").names == [q]
    write_peft(lora.remap(lambda n: n.replace("lm/", "encoder/")), tmp_path / "encoder")
    assert Delta.load(tmp_path / "encoder").components == ["encoder"]
