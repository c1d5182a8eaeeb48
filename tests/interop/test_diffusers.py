"""A pipeline of random weights in the shape of Stable Diffusion: what leaves the house is what diffusers loads and paints."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from pipelines import stable_diffusion
from tiny import context, live, seed, shake

from temperament.bases.load import load
from temperament.bases.probe import Answer, question
from temperament.delta import Delta
from temperament.delta.diffusers_format import FILE, write_diffusers_lora
from temperament.engine.denoise import Sampler, denoise
from temperament.errors import UserError
from temperament.run.export import export_delta, reloaded, reread, save_delta, write

pytest.importorskip("diffusers")
PROMPTS = ["a dog", "a tan goat on a bed"]
LORA = {"adapters.lora": {"rank": 2, "targets": ["attention", "conv", "text_encoder/all-linear"]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("pipeline") / "sd", seed())


@pytest.fixture(scope="module")
def base(folder):
    return load(folder)


@pytest.fixture(scope="module")
def delta(base):
    it = shake(live(base, LORA), 0.2)
    found = it.delta()
    it.close()
    assert found.components == ["denoiser", "text_encoder"]
    return found


@pytest.fixture(scope="module")
def start(base):
    return torch.randn(2, 4, 8, 8)


def paint(pipe, start):
    """As diffusers' pipeline does."""
    pipe.set_progress_bar_config(disable=True)
    made = pipe(PROMPTS, num_inference_steps=3, guidance_scale=2.5, latents=start.clone(), output_type="pt", eta=0.0)
    return made.images


def ours(base, start):
    return denoise(base, PROMPTS, Sampler(3, 0.0, 2.5), start=start).pixels


def pipeline(folder):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)


def test_the_one_loop_paints_what_the_pipeline_paints(base, folder, start):
    torch.testing.assert_close(ours(base, start), paint(pipeline(folder), start), rtol=1e-3, atol=1e-4)


def test_what_is_trained_is_the_denoiser_and_what_is_asked_for(base):
    names = lambda *trainable: {n.partition("/")[0] for n in live_names(base, *trainable)}
    assert names("select.full") == names("adapters.lora") == names("select.half") == {"denoiser"}
    assert names({"select.full": {"only": ["text_encoder"]}}) == {"text_encoder"}
    assert names({"adapters.lora": {"targets": ["all-linear", "text_encoder/q"]}}) == {"denoiser", "text_encoder"}
    assert names({"adapters.lora": {"targets": ["q"]}}) == {"denoiser"}
    with pytest.raises(UserError, match="codec"):
        live_names(base, {"select.full": {"only": ["codec"]}})


def live_names(base, *trainable):
    it = live(base, *trainable)
    it.close()
    return list(it.params)


def test_merged_loads_with_from_pretrained_and_paints_the_same(base, delta, start, tmp_path):
    base.apply(delta)
    try:
        write(base, tmp_path / "merged", "fp32")
        asked, want = question(base), ours(base, start)
        with torch.no_grad():
            said = Answer(base)(**asked)
    finally:
        base.reset()
    torch.testing.assert_close(paint(pipeline(tmp_path / "merged"), start), want, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(ours(base, start), want, atol=1e-2)
    with torch.no_grad():  # what the certificate asks in its own process
        torch.testing.assert_close(reread(None, tmp_path / "merged")[0](**asked), said, rtol=1e-5, atol=1e-6)


def test_a_lora_loads_in_diffusers_and_paints_the_same(base, folder, delta, start, tmp_path):
    write_diffusers_lora(delta, tmp_path / "lora", base=str(folder))
    base.apply(delta)
    want = ours(base, start)
    with torch.no_grad():
        said = Answer(base)(**question(base))
    base.reset()
    pipe = pipeline(folder)
    pipe.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(paint(pipe, start), want, rtol=2e-3, atol=5e-4)
    with torch.no_grad():
        again = reloaded(str(folder), tmp_path / "lora")[0](**question(base))
    torch.testing.assert_close(again, said, rtol=1e-4, atol=1e-5)


def test_a_lora_that_diffusers_wrote_is_read(base, folder, delta, start, tmp_path):
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    write_diffusers_lora(delta, tmp_path / "ours", base=str(folder))
    pipe = pipeline(folder)
    pipe.load_lora_weights(tmp_path / "ours")
    want = paint(pipe, start)
    both = {"unet": pipe.unet, "text": pipe.text_encoder}
    layers = {k: get_peft_model_state_dict(m, adapter_name="default_0") for k, m in both.items()}
    half = {k: v / 2 if "lora_B" in k else v for k, v in layers["unet"].items()}  # with the other half in alpha
    told = {"unet_lora_adapter_metadata": {"r": 2, "lora_alpha": 4, "alpha_pattern": {}, "use_rslora": False}}
    StableDiffusionPipeline.save_lora_weights(tmp_path / "theirs", half, layers["text"], **told)
    found = Delta.load(tmp_path / "theirs")
    base.apply(found)
    try:
        torch.testing.assert_close(ours(base, start), want, rtol=2e-3, atol=5e-4)
    finally:
        base.reset()


def test_what_lora_cannot_hold_is_refused_and_damage_is_seen(base, delta, tmp_path):
    it = shake(live(base, {"select.full": {"only": ["conv_out"]}}), 0.1)
    whole = it.delta()
    it.close()
    base.reset()
    with pytest.raises(UserError, match="low-rank"):
        write_diffusers_lora(whole, tmp_path / "no")
    assert save_delta(delta, base, tmp_path / "delta", "b") == "delta"
    assert Delta.load(tmp_path / "delta").digest == delta.digest
    write_diffusers_lora(delta, tmp_path / "lora")
    (tmp_path / "lora" / "delta.json").write_text(json.dumps({"format": "temperament.adapter.diffusers", "digest": "0"}))
    with pytest.raises(UserError, match="not those that were written"):
        Delta.load(tmp_path / "lora")
    (tmp_path / "lora" / "delta.json").unlink()
    assert Delta.load(tmp_path / "lora").components == ["denoiser", "text_encoder"] and (tmp_path / "lora" / FILE).exists()


def test_a_certificate_is_given_by_a_fresh_process(base, delta, tmp_path):
    found = export_delta(base, delta, tmp_path / "out", "adapter")
    assert found["passed"] and found["files"] == ["delta.json", FILE]


def test_the_shapes_of_a_pipeline_are_known_without_its_weights(folder, base):
    from temperament.run.plan import plan, shapes
    from temperament.run.recipe import read

    source = {"data.captions": {"captions": PROMPTS}}
    objective = {"objectives.diffusion.reward_backprop": {"rewards": ["rewards.brightness"], "steps": 2}}
    train = {"source": source, "objective": objective, "trainable": "adapters.lora", "batch": 2, "steps": 3}
    recipe = read({"base": str(folder), "steps": [{"name": "one", "train": train}]})
    meta = shapes(recipe)
    assert {n: tuple(p.shape) for n, p in meta.parameters()} == {n: tuple(p.shape) for n, p in base.parameters()}
    assert all(p.is_meta for _, p in meta.parameters())
    found = plan(recipe, meta)
    assert found["fits"] and found["steps"][0]["memory"]["activations"] > 0


def test_contexts_are_of_this_base(base):
    assert context(base).base is base and base.keeps == "evaluate.keep_pictures"
