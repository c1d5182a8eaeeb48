"""Runs on every kind of base - a version, one kept as a delta, a run, a step, an adapter - are loaded, exported, merged,
dialled right."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import temperament as tp
from temperament.bases.load import load
from temperament.delta import Delta, Dense, certificate
from temperament.errors import UserError
from temperament.run.export import delta_of, export_delta, reloaded
from temperament.run.reopen import subject
from tests.models import MODELS

IDS = torch.arange(7, 47).view(2, 20)


def logits(model):
    base = model if hasattr(model, "components") else subject(model)
    with torch.no_grad():
        return base.model(input_ids=IDS).logits


def close(a, b):
    return torch.allclose(a, b, atol=2e-4 * float(b.std()))


def run(folder, base, trainable="adapters.lora", steps=1, **more):
    source = {"data.lab": {"skills": ["shift"], "rows": 32}}
    train = {"source": source, "steps": steps, "batch": 4, "trainable": trainable, "optimizer": {"optim.adamw": {"lr": 1e-2}}}
    suites = [{"evaluate.lab": {"target": "shift", "retained": ["reverse"]}}]
    measured = {"suites": suites, "items": 4, "keep": False, "batch": 4, "diagnose": []}
    document = {"base": str(base), "check": False, "steps": [{"name": "sft", "train": train}], "evaluation": measured}
    return tp.tune(document | more, folder, report=False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPERAMENT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def here(monkeypatch):
    """Certificates probed in this process: the same code without the seconds of importing it."""

    def probe(command, **_):
        certificate._answer(Path(command[-1]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(certificate.subprocess, "run", probe)


def test_a_version_is_certified_in_a_fresh_process(tmp_path):
    run(tmp_path / "a", "lab/lm@half")
    assert tp.export(tmp_path / "a", tmp_path / "adapter", "adapter")["certificate"]["passed"]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("base", ["lab/lm@half", "lab/lm-instruct"])
def test_a_base_that_is_more_than_a_folder(tmp_path, base):
    made = run(tmp_path / "a", base, steps=2)
    wanted = logits(made)
    assert not close(wanted, logits(base)) and close(logits(tmp_path / "a"), wanted)
    for as_ in ("adapter", "merged", "delta"):
        told = tp.export(tmp_path / "a", tmp_path / as_, as_, dtype="fp32" if as_ == "merged" else None)
        assert told["certificate"]["passed"] and told["certificate"]["identity"]
        assert close(logits(tmp_path / as_), wanted)
    merged = tp.merge([str(tmp_path / "a")], tmp_path / "m")
    assert merged["certificate"]["passed"] and merged["base"] == base and close(logits(tmp_path / "m"), wanted)
    as_delta = tp.merge([str(tmp_path / "a")], tmp_path / "md", as_="delta")
    assert as_delta["certificate"]["passed"] and close(logits(tmp_path / "md"), wanted)
    from_model = tp.merge([str(tmp_path / "merged")], tmp_path / "mm", base=base, as_="delta")
    assert from_model["certificate"]["passed"] and close(logits(tmp_path / "mm"), wanted)
    turned = tp.dial(tmp_path / "a", strengths=[0.0, 0.5], items=2, budget=100, bake=tmp_path / "d", as_="adapter")
    assert turned["certificate"]["passed"]
    assert tp.diagnose(base, str(tmp_path / "a"))["delta"]["digest"] == made.delta.digest


@pytest.mark.usefixtures("here")
def test_a_merged_model_is_stored_as_its_base_is(tmp_path):
    small = load("lab/lm-small")
    small.model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    small.tokenizer.save_pretrained(tmp_path / "base")
    made, base = run(tmp_path / "a", tmp_path / "base", "select.half"), load(tmp_path / "base")
    assert base.stored == "bf16" and load(tmp_path / "a", own=True).stored == "bf16"
    wanted, exact = logits(made), {n: p.detach().clone() for n, p in made.model.named_parameters()}
    for asked, dtype in ((None, torch.bfloat16), ("fp32", torch.float32), ("fp16", torch.float16)):
        told = tp.export(tmp_path / "a", tmp_path / str(asked), dtype=asked)["certificate"]
        assert told["passed"] and (told["rounding"]["max_difference"] == 0) == (asked == "fp32")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(asked), dtype="auto")
        assert again.dtype == dtype and again.config.dtype == dtype
        assert all(torch.equal(p, exact[n].to(dtype)) for n, p in again.named_parameters())
    assert close(logits(tmp_path / "fp32"), wanted) and not close(logits(tmp_path / "None"), wanted)
    for wrong in ({"dtype": "int8"}, {"as_": "delta", "dtype": "bf16"}):
        with pytest.raises(UserError, match="--dtype is"):
            tp.export(tmp_path / "a", tmp_path / "x", **wrong)


@pytest.mark.usefixtures("here")
def test_lab_bases_merge_as_they_are(tmp_path):
    only = {"merge.linear": {"weights": [1.0, 0.0]}}
    told = tp.merge(["lab/lm-instruct", "lab/lm@half"], tmp_path / "m", base="lab/lm", method=only)
    assert told["certificate"]["passed"] and close(logits(tmp_path / "m"), logits("lab/lm-instruct"))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("trainable", ["adapters.lora", "select.half"])
def test_a_run_is_a_base_for_the_next(tmp_path, trainable):
    first = run(tmp_path / "a", "lab/lm", trainable)
    start = logits(first)
    still = run(tmp_path / "still", tmp_path / "a", steps=0)
    assert torch.equal(logits(still), logits(load(tmp_path / "a", own=True)))
    second = run(tmp_path / "b", tmp_path / "a")
    again = load(tmp_path / "b")
    wanted = logits(second)
    assert close(logits(again), wanted) and not close(wanted, start)
    with again.at("base"):
        assert close(logits(again), start)
    assert second.json["base"]["sha256"] != first.json["base"]["sha256"]
    rows = {s["name"]: s for s in second.json["ledger"]["skills"]}
    ended = {s["name"]: s for s in first.json["ledger"]["skills"]}
    assert all(rows[n]["before"] == ended[n]["after"] for n in rows)
    for as_ in ("merged", "delta"):
        told = tp.export(tmp_path / "b", tmp_path / as_, as_, dtype="fp32" if as_ == "merged" else None)
        assert told["certificate"]["passed"] and close(logits(tmp_path / as_), wanted)
    assert tp.merge([str(tmp_path / "b")], tmp_path / "m")["certificate"]["passed"] and close(logits(tmp_path / "m"), wanted)


@pytest.mark.usefixtures("here")
def test_a_step_of_a_run_is_a_model_and_a_base(tmp_path):
    two = run(tmp_path / "a", "lab/lm")
    document = two.recipe.plain()
    document["steps"] = [document["steps"][0], {**document["steps"][0], "name": "more"}]
    both = tp.tune(document, tmp_path / "ab", report=False)
    step = tmp_path / "ab" / "steps" / "sft"
    assert close(logits(step), logits(two)) and close(logits(tmp_path / "ab" / "steps" / "more"), logits(both))
    assert close(logits(step / "delta"), logits(two))
    on = run(tmp_path / "on", step)
    assert close(logits(tmp_path / "on"), logits(on))
    base = load("lab/lm")
    assert delta_of(str(step), base).digest == two.delta.digest
    told = tp.evaluate(step, [{"evaluate.lab": {"target": "shift", "retained": ["reverse"]}}], items=4, batch=4)
    rows = {s["name"]: s["after"] for s in told["ledger"]["skills"]}
    assert rows == {s["name"]: s["after"] for s in two.json["ledger"]["skills"]}
    assert tp.merge([str(step)], tmp_path / "m")["certificate"]["passed"] and close(logits(tmp_path / "m"), logits(two))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_who_a_base_is_does_not_hang_on_precision(precision):
    for name in ("lab/lm", "lab/lm@half", "lab/lm-instruct"):
        assert load(name, dtype=precision, own=True).sha256 == load(name).sha256
    assert load("lab/lm@half").sha256 != load("lab/lm").sha256 != load("lab/lm-instruct").sha256


def test_what_is_no_model_says_so(tmp_path):
    from temperament.errors import UserError

    run(tmp_path / "a", "lab/lm")
    stored = json.loads((tmp_path / "a" / "run.json").read_text())
    for change, word in (
        ({"status": "interrupted"}, "--resume"),
        ({"kind": "study", "runs": {"x": {"folder": "runs/x"}}}, "several"),
    ):
        (tmp_path / "a" / "run.json").write_text(json.dumps(stored | change))
        for use in (lambda: subject(tmp_path / "a"), lambda: tp.merge([str(tmp_path / "a")], tmp_path / "m")):
            with pytest.raises(UserError, match=word):
                use()


CODE = """from transformers import LlamaConfig, LlamaForCausalLM


class OursConfig(LlamaConfig):
    model_type = "ours_of_a_test"


class Ours(LlamaForCausalLM):
    config_class = OursConfig
"""


def test_what_is_made_on_a_trusted_base_is_checked_on_a_trusted_base(tmp_path, monkeypatch):
    """Python that comes with a folder runs in the fresh process where it ran here, and nowhere else."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, asked = tmp_path / "ours", {}
    MODELS["llama"].build(0).save_pretrained(folder)
    (folder / "modeling_ours.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_ours.OursConfig", "AutoModelForCausalLM": "modeling_ours.Ours"}
    config |= {"model_type": "ours_of_a_test", "architectures": ["Ours"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        load(folder)
    base = load(folder, trust_remote_code=True)
    name, weight = next((n, p) for n, p in base.parameters() if p.dim() == 2)
    delta = Delta({name: Dense(torch.randn(weight.shape))}, base=dict(base.sha256))
    monkeypatch.setattr("temperament.run.export.certify", lambda *a, **more: asked.update(more) or {"passed": True})
    export_delta(base, delta, tmp_path / "delta", "delta")
    assert asked["trust"] and reloaded(asked["base"], tmp_path / "delta", asked["trust"])[1] == base.sha256
    with pytest.raises(UserError):
        reloaded(asked["base"], tmp_path / "delta")
