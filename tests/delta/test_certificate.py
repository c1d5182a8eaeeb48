"""The certificate passes what is right and names what is wrong, in a process that knows only the files."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from temperament.delta import Delta, LowRank, certificate, identity, write_peft
from temperament.delta.certificate import certify, compare
from temperament.delta.tensorfile import write_tensors
from temperament.errors import UserError, WorkFailed

IDS = {"input_ids": torch.arange(12).view(2, 6)}


@pytest.fixture(scope="module")
def live():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=True, **sizes)).eval()


def tokenizer(words):
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", chat_template="{{ messages[0]['content'] }}")


@pytest.fixture
def here(monkeypatch):
    """The probe in this process: the same code without the seconds of importing it."""

    def run(command, **_):
        try:
            certificate._answer(Path(command[-1]))
            return SimpleNamespace(returncode=0)
        except Exception as error:
            return SimpleNamespace(returncode=1, stderr=f"Traceback\n{error}")

    monkeypatch.setattr(certificate.subprocess, "run", run)


def logits(model):
    with torch.no_grad():
        return model(**IDS).logits


def test_a_good_model_passes_in_a_fresh_process(live, tmp_path):
    live.save_pretrained(tmp_path / "m")
    words = tokenizer(["?", "The", "quick", "fox"])
    words.save_pretrained(tmp_path / "m")
    found = certify(tmp_path / "m", IDS, logits(live), live=live, processor=words)
    assert found["passed"] and found["max_difference"] < 1e-6 and found["kl"] < 1e-9 and found["agreement"] == 1
    assert found["tied"] == ["lm/lm_head.weight"] and "model.safetensors" in found["files"] and json.dumps(found)
    assert found["identity"] == identity(live)


def test_an_adapter_on_its_base(live, tmp_path, here):
    live.save_pretrained(tmp_path / "m")
    q = "lm/model.layers.0.self_attn.q_proj.weight"
    delta = Delta({q: LowRank(torch.randn(2, 16), torch.randn(16, 2))}, base=identity(live))
    delta.save(tmp_path / "d")
    with delta.applied(live):
        wanted = logits(live)
    assert certify(tmp_path / "d", IDS, wanted, base=tmp_path / "m")["passed"]
    assert certify(tmp_path / "d", IDS, logits(live), base=tmp_path / "m")["failures"] == ["outputs"]
    write_peft(delta, tmp_path / "p")
    assert certify(tmp_path / "p", IDS, wanted, base=tmp_path / "m")["passed"]


def test_what_is_wrong_is_named(live, tmp_path, here):
    live.save_pretrained(tmp_path / "m")
    tokenizer(["?", "The", "fox"]).save_pretrained(tmp_path / "m")
    state = {k: v.clone() for k, v in live.state_dict().items()}
    state["lm_head.weight"] = torch.randn(40, 16)  # a merge that split what was tied
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "model.safetensors").unlink()
    write_tensors(tmp_path / "m", state)
    found = certify(tmp_path / "m", IDS, logits(live), live=live, processor=tokenizer(["?", "The", "quick", "fox"]))
    assert not found["passed"] and found["failures"] == ["outputs", "tied weights", "tokenizer"]
    assert found["kl"] > 1e-6 and found["first_difference"] is not None


def test_a_folder_that_does_not_load(live, tmp_path, here):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises(WorkFailed, match="fresh process"):
        certify(tmp_path / "m", IDS, logits(live))
    with pytest.raises(UserError):
        certify(tmp_path / "nowhere", IDS, logits(live))


def test_compare():
    x = torch.randn(2, 3, 5)
    assert compare(x, x)["max_difference"] == 0 and compare(x, x)["first_difference"] is None
    y = x.clone()
    y[1, 0] = -y[1, 0]
    assert compare(y, x)["first_difference"] == 3 and compare(y, x)["agreement"] == pytest.approx(5 / 6)
    y[0, 0, 0] = float("nan")
    assert compare(y, x)["max_difference"] is None and json.dumps(compare(y, x), allow_nan=False)
    assert "shape" in compare(x[:1], x)["first_difference"]


def test_a_fresh_process_that_does_not_answer_in_time_is_one_sentence(live, tmp_path):
    live.save_pretrained(tmp_path / "m")
    with pytest.raises(WorkFailed, match="in a fresh process within"):
        certify(tmp_path / "m", IDS, logits(live), seconds=0.01)
