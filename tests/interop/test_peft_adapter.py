"""An adapter written by PEFT itself, as a model, a base, and an input of every verb; its logits are PEFT's."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

import temperament as tp
from temperament import cli
from temperament.bases.load import load
from temperament.delta import certificate
from temperament.run.reopen import subject

IDS = torch.arange(7, 47).view(2, 20)


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    """A cache of its own, and certificates probed in this process."""
    monkeypatch.setenv("TEMPERAMENT_CACHE", str(tmp_path / "cache"))

    def probe(command, **_):
        certificate._answer(Path(command[-1]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(certificate.subprocess, "run", probe)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def close(a, b):
    return torch.allclose(a, b, atol=1e-4 * float(b.std()))


CONFIGS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"target_modules": ["down_proj"], "use_rslora": True, "rank_pattern": {"layers.1.mlp.down_proj": 2}},
    "dora": {"target_modules": ["o_proj"], "use_dora": True},
    "saved": {"target_modules": ["gate_proj"], "modules_to_save": ["input_layernorm"]},
}


@pytest.fixture(params=list(CONFIGS))
def adapter(request, tmp_path):
    """(folder, PEFT's logits): every trained tensor far from its start."""
    base = load("lab/lm").model
    base.config._name_or_path = base.name_or_path = "lab/lm"
    made = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **CONFIGS[request.param]))
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    made.save_pretrained(tmp_path / "peft")
    assert "temperament" not in " ".join(p.name for p in (tmp_path / "peft").iterdir())
    return tmp_path / "peft", logits(made.eval())


def recipe(base, steps):
    train = {
        "source": {"data.lab": {"skills": ["shift"], "rows": 16}},
        "steps": steps,
        "batch": 4,
        "trainable": "adapters.lora",
    }
    suites = [{"evaluate.lab": {"target": "shift", "retained": ["reverse"]}}]
    measured = {"suites": suites, "items": 2, "keep": False, "diagnose": []}
    return {"base": str(base), "check": False, "steps": [{"name": "sft", "train": train}], "evaluation": measured}


def test_it_is_a_model_for_every_verb(adapter, tmp_path, capsys, monkeypatch):
    import io

    folder, wanted = adapter
    found = subject(folder)
    assert close(logits(found.model), wanted)
    with found.at("base"):
        assert close(logits(found.model), logits(load("lab/lm").model))
    merged = tp.merge([str(folder)], tmp_path / "merged", dtype="fp32")
    assert merged["certificate"]["passed"] and merged["base"] == "lab/lm"
    assert close(logits(load(tmp_path / "merged").model), wanted)
    look = tp.diagnose("lab/lm", str(folder))
    assert look["delta"]["parameters"] > 0
    suite = "{evaluate.lab: {target: shift, retained: [reverse]}}"
    told = tp.evaluate(folder, [suite], items=2, batch=2)
    assert "ledger" in told
    assert cli.main(["generate", str(folder), "--prompt", "reverse: a b =", "--max-new", "4", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["completions"][0]["outputs"][0]["text"]
    assert said == tp.generate(tmp_path / "merged", "reverse: a b =", max_new=4)[0]["outputs"][0]["text"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Copy a b.\n"))
    assert cli.main(["chat", str(folder), "--max-new", "4", "--json"]) == 0


def test_it_is_a_base_and_the_start_of_a_dial(adapter, tmp_path):
    folder, wanted = adapter
    still = tp.tune(recipe(folder, 0), tmp_path / "still", report=False)
    assert close(logits(still.model), wanted)
    run = tp.tune(recipe(folder, 1), tmp_path / "run", report=False)
    tuned = logits(run.model)
    again = load(tmp_path / "run")
    assert close(logits(again.model), tuned)
    with again.at("base") as model:
        assert close(logits(model), wanted)
    dialled = tp.dial(tmp_path / "run", strengths=[0.0, 1.0], items=2, bake=tmp_path / "baked", as_="merged")
    assert dialled["certificate"]["passed"]
    assert tp.export(tmp_path / "run", tmp_path / "adapter", "adapter")["certificate"]["passed"]
    assert close(logits(load(tmp_path / "adapter").model), tuned)


def test_an_adapter_for_another_base_is_refused_in_a_sentence(tmp_path, capsys):
    base = load("lab/lm-small").model
    base.config._name_or_path = base.name_or_path = "lab/lm"
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "peft")
    assert cli.main(["generate", str(tmp_path / "peft"), "--prompt", "a"]) == 2
    err = capsys.readouterr().err
    assert "shape" in err and "use its own base" in err and "Traceback" not in err
