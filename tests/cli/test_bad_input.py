"""What a new user may give by mistake: one sentence that names field, value and mend, exit code 2, nothing lost."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from temperament import cli
from temperament.bases.load import LAB


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(8)]
    (folder / "good.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("TEMPERAMENT_CACHE", str(place / "cache"))


def recipe(data="good.jsonl", base="lab/lm-small", **more):
    train = {"source": {"data.file": {"path": str(data)}}, "steps": 1, "batch": 4}
    suites = [{"evaluate.lab": {"target": "shift", "retained": ["copy"]}}]
    measured = {"keep": False, "items": 2, "diagnose": [], "suites": suites}
    document = {"base": base, "check": False, "steps": [{"name": "sft", "train": train}], "evaluation": measured}
    Path("recipe.yaml").write_text(yaml.safe_dump(document | more))
    return "recipe.yaml"


def refused(capsys, *argv):
    """The one sentence on stderr."""
    code = cli.main([*map(str, argv)])
    out, err = capsys.readouterr()
    lines = [line for line in err.strip().splitlines() if "Loading weights" not in line]
    assert code == 2 and not out and len(lines) == 1, (code, err)
    assert "Traceback" not in err and "internal" not in err and err.strip().endswith((".", "?"))
    return lines[0]


def tune(capsys, *sets, **how):
    shutil.rmtree("out", ignore_errors=True)
    return refused(capsys, "tune", recipe(**how), "--out", "out", "--quiet", *(x for s in sets for x in ("--set", s)))


@pytest.mark.parametrize(
    "entry, field, value, mend",
    [
        ("sft.train.batch=0", "steps[0].train.batch", "0", "at least 1"),
        ("sft.train.micro=0", "steps[0].train.micro", "0", "at least 1"),
        ("evaluation.items=0", "evaluation.items", "0", "at least 1"),
        ("sft.train.clip=-1", "steps[0].train.clip", "-1", "null for none"),
        ("sft.train.ema=2", "steps[0].train.ema", "2", "between 0 and 1"),
        ("sft.train.optimizer.optim.adamw.lr=-1", "optim.adamw.lr", "-1", "not be negative"),
        ("sft.train.optimizer.optim.adamw.betas=[2,3]", "optim.adamw.betas", "[2", "[0, 1)"),
        ("sft.train.optimizer.optim.adamw.weight_decay=-5", "optim.adamw.weight_decay", "-5", "not be negative"),
        ("sft.train.optimizer={optim.sgd: {momentum: 1}}", "optim.sgd.momentum", "1", "[0, 1)"),
        ("sft.train.trainable={adapters.lora: {rank: 0}}", "adapters.lora.rank", "0", "at least 1"),
        ("device=tpu", "device", "'tpu'", "auto or one of cpu"),
        ("device=cuda:77", "device", "'cuda:77'", "CUDA_VISIBLE_DEVICES=77"),
    ],
)
def test_a_number_that_cannot_be(capsys, entry, field, value, mend):
    sentence = tune(capsys, entry)
    assert f"{field} is {value}" in sentence and mend in sentence and "'source'" not in sentence
    assert not (Path("out") / "checkpoints").exists()


def test_rows_that_cannot_be_found_or_read(capsys):
    assert "addresses are not fetched" in tune(capsys, data="https://example.com/x.jsonl")
    Path("null.jsonl").write_text('{"prompt": null, "completion": "a"}\n' * 4)
    sentence = tune(capsys, data="null.jsonl")
    assert "prompt + completion" in sentence and "did you mean" not in sentence


def damaged(name, change=None):
    shutil.rmtree(name, ignore_errors=True)
    shutil.copytree(LAB / "lm-small", name)
    tensors = load_file(f"{name}/model.safetensors")
    q = next(t for t in tensors if "q_proj" in t)
    if change is not None:
        change(tensors, q)
        save_file(tensors, f"{name}/model.safetensors", {"format": "pt"})
    return q


def test_a_base_of_which_something_is_missing(capsys):
    """Transformers draws missing weights at random and says so in a warning that nobody sees."""
    q = damaged("lacks", lambda tensors, q: tensors.pop(q))
    assert q in (sentence := tune(capsys, base="lacks")) and "would be random" in sentence
    assert "would be random" in refused(capsys, "generate", "lacks", "--prompt", "a")
    q = damaged("nan", lambda tensors, q: tensors[q].fill_(torch.nan))
    assert q in (sentence := tune(capsys, base="nan")) and "NaN" in sentence
    damaged("other")
    config = json.loads(Path("other/config.json").read_text())
    Path("other/config.json").write_text(json.dumps(config | {"hidden_size": 96}))
    assert "other shapes than its config.json" in tune(capsys, base="other")
    damaged("words")
    Path("words/tokenizer.json").write_text("{}")
    assert "tokenizer.json" in (sentence := tune(capsys, base="words")) and "copy it again" in sentence


@pytest.mark.parametrize("base, mend", [("https://huggingface.co/x/y", "as org/name"), ("", "name a lab base")])
def test_a_base_that_is_no_name(capsys, base, mend):
    assert mend in tune(capsys, base=base)


def test_a_run_whose_record_is_something_else(capsys):
    Path("run").mkdir(exist_ok=True)
    Path("run/run.json").write_text("[]")
    for verb in (("dial", "run"), ("export", "run", "--to", "x"), ("eval", "run"), ("tune", recipe(), "--out", "run")):
        assert "run.json" in refused(capsys, *verb), verb
    assert not Path("x").exists()


def test_a_device_that_is_not_there(capsys):
    for device in ("tpu", "cuda:77"):
        assert "device" in refused(capsys, "eval", "lab/lm-small", "--device", device)


@pytest.fixture(scope="module")
def run(place):
    import os

    was = Path.cwd()
    os.chdir(place)
    try:
        assert cli.main(["tune", recipe(), "--out", "tuned", "--quiet"]) == 0
    finally:
        os.chdir(was)
    return "tuned"


def test_what_a_finished_run_is_asked_for(capsys, run):
    Path("full").mkdir()
    Path("full/x").write_text("mine")
    export = lambda *a: refused(capsys, "export", run, *a)
    dial = lambda *a: refused(capsys, "dial", run, *a)
    assert "finite" in export("--to", "x", "--at", "nan")
    for way in (("good.jsonl/x",), ("/proc/no/x", "--as", "delta")):
        assert "cannot be made" in export("--to", *way)
    assert "--items is 0" in dial("--items", "0") and "finite" in dial("--strengths", "nan,1")
    assert "--bake is 'full'" in dial("--bake", "full") and Path("full/x").read_text() == "mine"
    assert "merge.linear" in dial("--shape", "nix"), "of the parts those that could stand here are named"
    assert "no run is in this folder" in refused(capsys, "export", "lab/lm", "--to", "x")
    shutil.copytree(run, "gone", dirs_exist_ok=True)
    shutil.rmtree("gone/delta")
    assert "is missing" in refused(capsys, "dial", "gone") and "is missing" in refused(capsys, "chat", "gone")


def test_prompts_and_models_that_cannot_be(capsys):
    assert "reads at most 512" in refused(capsys, "generate", "lab/lm-small", "--prompt", "a " * 600)
    assert "UTF-8" in refused(capsys, "generate", "lab/lm-small", "--prompt", "a\udcff")
    assert "no such folder" in refused(capsys, "merge", "nix1", "nix2", "--out", "x")
    assert "this is a file" in refused(capsys, "merge", "good.jsonl", "--out", "x")
    assert "--n is -1" in refused(capsys, "data", "good.jsonl", "--base", "lab/lm-small", "--n", "-1")
    assert "diagnose.intruder_dimensions" in refused(capsys, "diagnose", "lab/lm-small", "x", "--with", "nix")
