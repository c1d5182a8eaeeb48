"""PEFT both ways: what peft saved is applied here, what is written here is loaded by peft, with the same logits."""

import json
import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from temperament.delta import (
    Delta,
    Dense,
    LowRank,
    Masked,
    Multiplied,
    Renormalised,
    Replace,
    Rows,
    identity,
    not_peft,
    read_peft,
    write_peft,
)
from temperament.delta.change import Change
from temperament.delta.peft_write import task_type
from temperament.errors import UserError

peft = pytest.importorskip("peft")

IDS = torch.arange(12).view(2, 6)


def llama(tied=False):
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=tied, attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()


class Convs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.line = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv1d(4, 4, 3)
        self.embed, self.head = nn.Embedding(40, 27), nn.Linear(4, 5)

    def forward(self, ids):
        x = self.embed(ids[:, :4]).unflatten(2, (3, 3, 3)).transpose(1, 2).flatten(3).repeat(1, 1, 1, 1)
        x = self.second(torch.relu(self.first(x)))
        return self.head(self.line(x.flatten(2)).mean(2))


def logits(model):
    with torch.no_grad():
        out = model(IDS)
        return getattr(out, "logits", out)


def shaken(model):
    """Every trainable parameter random, so that a wrong scale, layout or key shows."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3) if "magnitude" not in name else p.mul_(1 + 0.3 * torch.rand_like(p))
    return model


ATTENTION = ["q_proj", "v_proj"]
CASES = {
    "llama": (llama, dict(target_modules=ATTENTION)),
    "all linear": (llama, dict(target_modules="all-linear", task_type="CAUSAL_LM")),
    "rslora": (llama, dict(target_modules=ATTENTION, use_rslora=True)),
    "patterns": (llama, dict(target_modules=[*ATTENTION, "down_proj"],
                             rank_pattern={"v_proj": 2, "layers.0.self_attn.q_proj": 5},
                             alpha_pattern={"down_proj": 3, r"^model\.layers\.1\.self_attn\.q_proj": 7})),
    "modules to save": (llama, dict(target_modules=ATTENTION, modules_to_save=["lm_head", "input_layernorm"])),
    "embedding": (llama, dict(target_modules=["embed_tokens", "q_proj"])),
    "tied": (lambda: llama(True), dict(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)),
    "dora": (llama, dict(target_modules=ATTENTION, use_dora=True)),
    "biases": (llama, dict(target_modules=ATTENTION, bias="all")),
    "lora bias": (llama, dict(target_modules=ATTENTION, lora_bias=True)),
    "gpt2": (gpt2, dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "gpt2 dora": (gpt2, dict(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)),
    "gpt2 embedding": (gpt2, dict(target_modules=["wpe", "c_fc"], fan_in_fan_out=True)),
    "conv": (Convs, dict(target_modules=["first", "second", "head"])),
    "conv1d": (Convs, dict(target_modules=["line"])),
    "conv dora": (Convs, dict(target_modules=["first", "head"], use_dora=True)),
    "conv embedding": (Convs, dict(target_modules=["embed"])),
    "embedding dora": (Convs, dict(target_modules=["embed"], use_dora=True)),
}  # fmt: skip


def load_by_peft(base, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(weight_tying|tie_word|Conv1D).*")
        return peft.PeftModel.from_pretrained(deepcopy(base), str(folder)).eval()


@pytest.mark.parametrize("case", sorted(CASES))
def test_what_peft_saves_and_loads(case, tmp_path):
    make, options = CASES[case]
    base = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = shaken(peft.get_peft_model(deepcopy(base), peft.LoraConfig(r=4, lora_alpha=6, **options))).eval()
        theirs.save_pretrained(tmp_path / "theirs")
    wanted = logits(theirs)
    assert (wanted - logits(base)).abs().max() > 1e-3

    delta = read_peft(tmp_path / "theirs", base)
    assert not any(torch.equal(c.apply(w), w) for n, c in delta.changes.items() for w in [base.state_dict()[n[3:]]])
    torch.testing.assert_close(logits(delta.apply(deepcopy(base))), wanted, rtol=1e-4, atol=2e-5)
    delta = Delta(delta.changes, base=identity(base))
    write_peft(delta, tmp_path / "ours", base=base)
    torch.testing.assert_close(logits(load_by_peft(base, tmp_path / "ours")), wanted, rtol=1e-4, atol=2e-5)

    again = Delta.load(tmp_path / "ours")
    assert again.base == identity(base) and again.names == delta.names
    write_peft(again, tmp_path / "again", base=base)
    for file in ("adapter_model.safetensors", "adapter_config.json", "delta.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def r(*shape):
    return torch.randn(*shape) * 0.3


OURS = {
    "strength": lambda: Delta({Q: LowRank(r(3, 16), r(16, 3), scale=0.7)}, strength=-0.6),
    "sum": lambda: Delta({Q: LowRank(r(3, 16), r(16, 3), scale=0.7)}) + Delta({Q: LowRank(r(2, 16), r(16, 2))}) * 0.3,
    "rows": lambda: Delta({Q: Rows(LowRank(r(3, 16), r(4, 3), scale=2.0), torch.tensor([9, 1, 3, 4]), (16, 16))}),
    "row mask": lambda: Delta({Q: Masked(LowRank(r(3, 16), r(16, 3)), r(16, 1) > 0, scale=0.5)}),
    "ranks": lambda: Delta({Q: LowRank(r(3, 16), r(16, 3)), D: LowRank(r(2, 24), r(16, 2), scale=1 / 3)}),
    "dense": lambda: Delta({Q: LowRank(r(3, 16), r(16, 3)), D: Dense(r(16, 24)), N: Multiplied(r(16)), B: Dense(r(16))}),
    "dora": lambda: Delta({Q: Renormalised(LowRank(r(3, 16), r(16, 3)), r(16).abs())}),
    "only whole": lambda: Delta({N: Replace(r(16))}),
}
Q, D = "lm/model.layers.1.self_attn.q_proj.weight", "lm/model.layers.0.mlp.down_proj.weight"
N, B = "lm/model.norm.weight", "lm/model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize("given", ["base", "alone"])
@pytest.mark.parametrize("case", sorted(OURS))
def test_peft_loads_what_we_make(case, given, tmp_path):
    base, delta = llama(), OURS[case]()
    source = base if given == "base" else None
    if given == "alone" and case == "dense":
        assert "pass the base" in not_peft(delta)
        return
    assert not not_peft(delta, source)
    wanted = logits(delta.apply(deepcopy(base)))
    write_peft(delta, tmp_path / "a", base=source)
    torch.testing.assert_close(logits(load_by_peft(base, tmp_path / "a")), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(read_peft(tmp_path / "a").apply(deepcopy(base))), wanted, rtol=1e-4, atol=1e-5)


def test_short_targets_where_they_say_the_same(tmp_path):
    base = llama()
    layers = [f"lm/model.layers.{i}.self_attn.{n}.weight" for i in range(2) for n in ATTENTION]
    shapes = dict(zip(ATTENTION, (16, 8), strict=True))
    delta = Delta({name: LowRank(r(2, 16), r(shapes[name.split(".")[-2]], 2)) for name in layers})
    for part, wanted in ((delta, ATTENTION), (delta.restrict(layers[1:]), [n[3:-7] for n in layers[1:]])):
        write_peft(part, tmp_path / str(len(part.names)), base=base)
        assert json.loads((tmp_path / str(len(part.names)) / "adapter_config.json").read_text())["target_modules"] == wanted


def test_a_tied_embedding_that_peft_splits_is_refused(tmp_path):
    base = llama(tied=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = shaken(peft.get_peft_model(deepcopy(base), peft.LoraConfig(target_modules=["embed_tokens"])))
        theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="untie"):
        read_peft(tmp_path, base)


def saved(tmp_path, **config):
    write_peft(OURS["strength"](), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return tmp_path / "a"


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "IA3"}, {"peft_type": None}, {"layer_replication": [[0, 1]]}, {"init_lora_weights": "pissa_niter_4"},
        {"alpha_pattern": {"(": 3}}, {"lora_alpha": "6"}, {"lora_alpha": True},
        {"alora_invocation_tokens": [1]}, {"use_dora": True},
    ],
)  # fmt: skip
def test_configs_with_no_equal_are_refused(tmp_path, config):
    with pytest.raises(UserError):
        read_peft(saved(tmp_path, **config))


def test_damage_is_refused(tmp_path):
    folder = saved(tmp_path)
    weights = folder / "adapter_model.safetensors"
    good = weights.read_bytes()
    for bad, words in ((good[:-4], "truncated"), (good[:-1] + b"!", "saved")):
        weights.write_bytes(bad)
        with pytest.raises(UserError, match=words):
            Delta.load(folder)
    weights.write_bytes(good)
    torch.save({}, folder / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match="pickle"):
        Delta.load(folder)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "/x"])
def test_adapter_names_stay_inside(tmp_path, name):
    with pytest.raises(UserError, match="adapter name"):
        write_peft(OURS["strength"](), tmp_path / "a", name=name)
    assert not any(tmp_path.iterdir())


def test_what_peft_cannot_hold_is_said(tmp_path):
    for delta in (
        Delta({"lm/a.weight": LowRank(r(1, 2), r(2, 1)), "codec/a.weight": LowRank(r(1, 2), r(2, 1))}),
        Delta({Q: LowRank(r(3, 16), r(16, 3))}, buffers={"lm/x": torch.ones(1)}),
        Delta({Q: Renormalised(LowRank(r(3, 16), r(16, 3)), r(16)), D: LowRank(r(2, 24), r(16, 2))}),
    ):
        assert not_peft(delta)
        with pytest.raises(UserError):
            write_peft(delta, tmp_path / "a")
    assert not any(tmp_path.iterdir()) and Change.kinds


@pytest.mark.parametrize(
    "name, encoder_decoder, task",
    [
        ("LlamaForCausalLM", False, "CAUSAL_LM"),
        ("GPT2LMHeadModel", False, "CAUSAL_LM"),
        ("T5ForConditionalGeneration", True, "SEQ_2_SEQ_LM"),
        ("LlavaForConditionalGeneration", False, "CAUSAL_LM"),
        ("BertForSequenceClassification", False, "SEQ_CLS"),
        ("BertForMaskedLM", False, None),
        ("ViTForImageClassification", False, None),
    ],
)
def test_the_task_is_that_of_the_base(name, encoder_decoder, task):
    assert task_type([name], encoder_decoder) == task and (task is None or task in peft.TaskType.__members__)
