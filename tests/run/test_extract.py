"""A change extracted from two checkpoints has the error it states, and PEFT reads the low-rank ones."""

import json
import shutil

import pytest
import torch
from run.test_merging import tiny, weights
from safetensors.torch import save_file

from temperament.delta import Delta, LowRank
from temperament.errors import UserError, WorkFailed
from temperament.run.extract import extract
from temperament.run.merging import merge


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    return tiny(root / "base"), tiny(root / "tuned", 5)


def restored(base, folder):
    return Delta.load(folder).apply({f"lm/{k}": v for k, v in weights(base).items()})


def off(base, tuned, got):
    base, tuned = weights(base), weights(tuned)
    left = sum(float((got[f"lm/{k}"] - tuned[k]).double().square().sum()) for k in base)
    return (left / sum(float((tuned[k] - base[k]).double().square().sum()) for k in base)) ** 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "low_rank", "rank": 4},
        {"kind": "low_rank", "error": 0.3},
        {"kind": "sparse", "density": 0.1},
        {"kind": "sparse", "error": 0.2},
        {"kind": "ternary"},
        {"kind": "ternary", "density": 0.2},
        {"kind": "ternary", "error": 0.6},
    ],
)
def test_error_and_size_are_as_stated(pair, tmp_path, options):
    base, tuned = map(str, pair)
    checked = options in ({"kind": "sparse", "error": 0.2}, {"kind": "ternary"})  # a fresh process each: two are enough
    done = extract(base, tuned, tmp_path / "out", **options, certificate=checked)
    assert not checked or (done["certificate"]["passed"] and done["certificate"]["by"] == "temperament")
    assert done["error"] == pytest.approx(off(base, tuned, restored(base, tmp_path / "out")), rel=1e-3)
    if "error" in options:
        assert all(row["error"] <= options["error"] * 1.001 for row in done["tensors"])
        assert done["error"] > 0.2 * options["error"] or options["kind"] == "low_rank"  # noise is of full rank: kept whole
    if options["kind"] == "ternary":
        assert done["times_smaller"] > 8
    if options.get("rank"):
        delta = Delta.load(tmp_path / "out")
        assert all(c.rank <= 4 for c in delta.changes.values() if isinstance(c, LowRank))


def test_peft_reads_a_low_rank_and_computes_the_same(pair, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    base, tuned = pair
    assert extract(str(base), str(tuned), tmp_path / "lora", rank=3, certificate=False)["as"] == "peft"
    ours = restored(base, tmp_path / "lora")
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.load_state_dict({k[3:]: v for k, v in ours.items()}, strict=False)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5)
    merge([str(tmp_path / "lora")], tmp_path / "model", certificate=False)
    assert all(torch.allclose(weights(tmp_path / "model")[k[3:]], v, atol=1e-6) for k, v in ours.items())


def test_refusals(pair, tmp_path):
    base, tuned = map(str, pair)
    for options, message in [
        ({"kind": "lowrank", "rank": 3}, "did you mean 'low_rank'"), ({"kind": "low_rank"}, "one of rank and error"),
        ({"kind": "sparse", "density": 0.1, "error": 0.1}, "one of density and error"), ({"rank": 0}, "at least 1"),
        ({"error": 1.5}, "between 0 and 1"), ({"kind": "ternary", "error": 0.1}, "come no closer"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            extract(base, tuned, tmp_path / "no", **options)
        assert not (tmp_path / "no").exists()


def test_what_an_extract_cannot_hold_is_said(pair, tmp_path):
    """A tensor that only the tuned side has would be lost without a word; of equal checkpoints there is nothing."""
    base, tuned = pair
    more = tmp_path / "more"
    shutil.copytree(tuned, more)
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}
    save_file(weights(tuned) | bias, more / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="q_proj"):
        extract(str(base), str(more), tmp_path / "no", kind="sparse", density=0.5)
    for kind in ("low_rank", "sparse"):
        with pytest.raises(UserError, match="nothing to extract"):
            extract(str(base), str(base), tmp_path / "no", kind=kind, error=0.5)


@pytest.mark.parametrize("tied, options", [(True, {"rank": 16}), (True, {"error": 0.05}), (False, {"error": 0.05})])
def test_an_embedding_kept_whole_loads_in_peft_and_gives_the_tuned_model(tmp_path, tied, options):
    import peft
    from transformers import AutoModelForCausalLM

    base, tuned = (tiny(tmp_path / str(seed), seed, tie_word_embeddings=tied) for seed in (0, 6))
    done = extract(str(base), str(tuned), tmp_path / "out", **options)
    kept = json.loads((tmp_path / "out/certificate.json").read_text())
    assert kept == done["certificate"] and kept["passed"] and kept["by"] == "peft"
    assert kept["error"]["largest"] <= 1e-5 and kept["error"]["stated"] == options.get("error")
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tuned)(input_ids=ids).logits
        assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-6)
        merged = model.merge_and_unload()
        assert torch.allclose(merged(input_ids=ids).logits, wanted, atol=1e-6)
    # and so do we, from the folder alone and through a merge
    got = restored(base, tmp_path / "out")
    assert all(torch.allclose(got[f"lm/{k}"], v, atol=1e-6) for k, v in weights(tuned).items())
    merge([str(tmp_path / "out")], tmp_path / "model", certificate=False)
    assert all(torch.allclose(weights(tmp_path / "model")[k], v, atol=1e-6) for k, v in weights(tuned).items())


def test_a_file_that_does_not_hold_what_was_extracted_fails_its_certificate(pair, tmp_path, monkeypatch):
    from temperament.run import extract as module

    plain = module._write

    def worse(delta, *rest):
        name = sorted(delta.changes)[1]
        return plain(module.replace(delta, changes={n: c for n, c in delta.changes.items() if n != name}), *rest)

    monkeypatch.setattr(module, "_write", worse)
    with pytest.raises(WorkFailed, match="errors, outputs"):
        extract(*map(str, pair), tmp_path / "out", kind="sparse", error=0.3)
    assert not json.loads((tmp_path / "out/certificate.json").read_text())["passed"]


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("kind", ["low_rank", "sparse"])
def test_nan_on_either_side_is_one_sentence(pair, tmp_path, side, kind):
    folders = dict(zip(("base", "tuned"), pair, strict=True))
    folders[side] = shutil.copytree(folders[side], tmp_path / side)
    name = "model.layers.1.mlp.up_proj.weight"
    state = weights(folders[side])
    state[name][2, 3] = float("nan")
    save_file(state, folders[side] / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"{side}/model.safetensors, tensor .*{name}") as found:
        extract(str(folders["base"]), str(folders["tuned"]), tmp_path / "out", kind=kind, error=0.3)
    assert "\n" not in str(found.value) and not (tmp_path / "out").exists()
