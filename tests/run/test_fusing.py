"""`temper merge` of models of different origin: folders in, one folder out, certified; what cannot be is one sentence."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from temperament.errors import UserError
from temperament.run.merging import merge

SHAPE = dict(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
FEW = {"rows": 4, "length": 8}


def tiny(folder, seed, **config):
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, "tie_word_embeddings": True, **config})).save_pretrained(folder)
    return str(folder)


def test_two_origins(tmp_path):
    a, b = tiny(tmp_path / "a", 1), tiny(tmp_path / "b", 2)
    done = merge([a, b], tmp_path / "ab", method={"merge.pleas": FEW}, certificate=False)
    wide = merge([a, b], tmp_path / "wide", method={"merge.pleas": {**FEW, "apart": 0.5}})  # a fresh process: once is enough
    assert wide["certificate"]["passed"] and wide["certificate"]["tied"] == ["lm/lm_head.weight"]
    assert wide["parameters"] > done["parameters"]
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "wide").config
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (
        36,
        4,
        2,
    )  # 6 heads do not divide 16
    merge([a, b], tmp_path / "both", method={"merge.pleas": {**FEW, "apart": 1.0}}, certificate=False)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "both").config
    assert (config.intermediate_size, config.num_attention_heads, config.head_dim) == (48, 8, 4)
    free = merge([a, b], tmp_path / "free", method={"merge.pleas": {"match": "weights", "solve": False}}, certificate=False)
    assert free["base"] is None and (tmp_path / "free" / "README.md").is_file()
    alone = merge([a, a], tmp_path / "same", method={"merge.pleas": FEW}, certificate=False)
    assert alone["models"] == [a, a]
    kept, got = load_file(tmp_path / "a/model.safetensors"), load_file(tmp_path / "same/model.safetensors")
    assert all(torch.allclose(kept[n], got[n], atol=1e-5) for n in kept)


def test_refusals_before_anything_is_written(tmp_path):
    a, out = tiny(tmp_path / "a", 1), tmp_path / "never"
    broken = tiny(tmp_path / "broken", 2)
    state = load_file(tmp_path / "broken/model.safetensors")
    state["model.norm.weight"][0] = float("nan")
    save_file(state, tmp_path / "broken/model.safetensors", {"format": "pt"})
    for call, message in [
        (lambda: merge([a], out, method="merge.pleas"), "it merges 2"),
        (lambda: merge([a, a], out, method="merge.pleas", as_="delta"), "use merged"),
        (lambda: merge([a, a], out, method="merge.pleas", dtype="fp8"), "dtype"),
        (lambda: merge([a, tiny(tmp_path / "wide", 1, hidden_size=32)], out, method="merge.pleas"), "one architecture"),
        (lambda: merge([a, tiny(tmp_path / "words", 1, vocab_size=64)], out, method="merge.pleas"), "one architecture"),
        (lambda: merge([a, tiny(tmp_path / "deep", 1, num_hidden_layers=3)], out, method="merge.pleas"), "one architecture"),
        (lambda: merge([a, broken], out, method={"merge.pleas": FEW}), "finite"),
        (lambda: merge([a, str(tmp_path / "nothing")], out, method="merge.pleas"), "no such folder"),
    ]:
        with pytest.raises(UserError, match=message):
            call()
        assert not out.exists(), message
