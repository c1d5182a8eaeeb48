"""A user's folder of pictures and a pipeline of diffusers, by the verbs: data, plan, check, tune, dial, diagnose, merged."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from pipelines import photos, stable_diffusion

from temperament import api
from temperament.bases.load import load
from temperament.methods.rewards.brightness import Brightness
from temperament.run.diagnose import diagnose
from temperament.run.tune import tune

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """Their folders: a pipeline and photos."""
    folder = tmp_path_factory.mktemp("user")
    stable_diffusion(folder / "sd"), photos(folder / "photos")
    return folder


def dreambooth(user, **train):
    photo = {"data.folder_images": {"path": str(user / "photos"), "caption": "a {identifier} {noun}"}}
    sampler = {"sample.sampler": {"steps": 2, "guidance": 1.0}}
    source = {"data.prior_preservation": {"of": photo, "noun": "dog", "identifier": "sks", "count": 2, "sampler": sampler}}
    step = {"source": source, "objective": "objectives.diffusion.denoise", "optimizer": {"optim.adamw": {"lr": 1e-2}}}
    evaluation = {"items": 2, "dial": {"strengths": [0.0, 1.0], "items": 2}}
    return {
        "base": str(user / "sd"),
        "inference": [sampler],
        "evaluation": evaluation,
        "steps": [{"name": "dream", "train": {**step, "batch": 4, "micro": 2, "steps": 2, **train}}],
    }


def test_a_folder_is_shown_as_the_text_encoder_reads_it(user, tmp_path):
    named = photos(tmp_path / "named", 2)
    (named / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"photo-{i}.png", "text": "a dog"}) + "\n" for i in range(2))
    )
    told = api.look(named, load(user / "sd"), n=1)
    assert told["shape"] == "captioned" and "text encoder" in told["notes"][-1]


def test_dreambooth_from_a_folder_with_its_ledger_dial_and_diagnosis(user, tmp_path):
    lora = {"adapters.lora": {"rank": 2, "targets": ["attention", "text_encoder/all-linear"]}}
    run = tune(dreambooth(user, trainable=lora), tmp_path / "run")
    assert run.json["status"] == "done" and run.json["plan"]["predicted"]["peak_bytes"] > 0
    laws = {law["name"]: law for law in run.json["check"]["steps"][0]["laws"]}
    assert all(law["ok"] for law in laws.values()) and laws["merged = unmerged"]["tolerance"] > 0
    skills = {s["name"]: s for s in run.json["ledger"]["skills"]}
    assert {"subject", "class", "variety", "keep"} <= set(skills) and skills["subject"]["role"] == "target"
    assert skills["keep"]["after"] < 1 and skills["variety"]["kind"] == "set"
    assert [p["strength"] for p in run.json["dial"]["points"]] == [0.0, 1.0]
    assert run.json["delta"]["files"] == "delta" and run.delta.components == ["denoiser", "text_encoder"]
    found = diagnose(str(user / "sd"), str(tmp_path / "run"))
    assert found["delta"]["digest"] == run.json["delta"]["digest"]
    again = load(tmp_path / "run", own=True)  # as the base of another recipe
    assert again.components.keys() == {"denoiser", "text_encoder", "codec"} and again.processors["pipeline"]


def test_a_reward_is_tuned_through_the_codec_and_exported(user, tmp_path):
    """The gradient of the pixels' brightness passes the VAE's decoder, which stays as it is, and moves the right way."""
    said = ["a dog", "a sad dog"]
    objective = {"rewards": [{"rewards.brightness": {}}], "steps": 2, "guidance": 1.0, "least": 2}
    step = {
        "source": {"data.captions": {"captions": said}},
        "objective": {"objectives.diffusion.reward_backprop": objective},
        "trainable": {"adapters.lora": {"rank": 2, "targets": ["attention"]}},
        "optimizer": {"optim.adamw": {"lr": 1e-2}},
    }
    suite = {"evaluate.rewarded": {"reward": {"rewards.brightness": {}}, "captions": said}}
    document = {
        "base": str(user / "sd"),
        "inference": [{"sample.sampler": {"steps": 2, "guidance": 1.0}}],
        "evaluation": {"items": 4, "suites": [suite], "diagnose": []},
        "steps": [{"name": "bright", "train": {**step, "batch": 4, "micro": 2, "steps": 2}}],
    }
    run = tune(document, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    rows = [r for r in rows if "loss" in r]
    assert len(rows) == 2 and all(r["grad_norm"] > 0 for r in rows), rows
    assert run.delta.components == ["denoiser"]
    assert all(law["ok"] for law in run.json["check"]["steps"][0]["laws"])
    (reward,) = (s for s in run.json["ledger"]["skills"] if s["name"] == "reward")
    assert reward["role"] == "target" and reward["after"] > reward["before"], reward
    assert api.export(tmp_path / "run", tmp_path / "bright")["certificate"]["passed"]
    paint = lambda m: torch.stack([p["pixels"] for p in api.sample(m, said, steps=2, guidance=1.0)["pictures"]])
    was, now = paint(load(user / "sd")), paint(load(tmp_path / "bright"))
    light = Brightness()
    assert float(light.value(now, said).mean()) > float(light.value(was, said).mean())
    codec = [load_file(m / "vae" / "diffusion_pytorch_model.safetensors") for m in (user / "sd", tmp_path / "bright")]
    assert codec[0].keys() == codec[1].keys() and all(torch.equal(v, codec[1][n]) for n, v in codec[0].items())
