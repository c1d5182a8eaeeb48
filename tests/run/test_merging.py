"""`temper merge` on folders, adapters and runs: what is written is what was asked, and what cannot be is one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from temperament import parts
from temperament.delta import Delta, Dense, LowRank, between, identity, write_peft
from temperament.errors import UserError, WorkFailed
from temperament.run.merging import merge, planned

WORDS = ["<unk>", "</s>", *(f"w{i}" for i in range(46))]


def tiny(folder, seed=0, like=None, dtype=torch.float32, **config):
    torch.manual_seed(7)
    shape = dict(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1
    )
    model = LlamaForCausalLM(LlamaConfig(**{**shape, "tie_word_embeddings": True, **config}))
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=g) * (seed > 0)
    model.to(dtype).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("lab")
    return root, [tiny(root / name, seed) for seed, name in enumerate(("base", "a", "b", "c"))]


def weights(folder):
    return {k: v for f in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize(
    "method", ["merge.linear", {"merge.ties": {"density": 0.4}}, "merge.karcher", {"merge.dare": {"density": 0.5}}]
)
def test_folders(lab, tmp_path, method):
    _, (base, *tuned) = lab
    certificate = method == "merge.linear"  # a fresh process each: one is enough
    done = merge(
        [str(t) for t in tuned], tmp_path / "out", method=method, base=str(base), shard_bytes=6000, certificate=certificate
    )
    if certificate:
        assert done["certificate"]["passed"] and done["certificate"]["tied"] == ["lm/lm_head.weight"]
    expected = parts.build(method).merge(str(base), [between(str(base), str(t)) for t in tuned])
    expected = expected.apply({f"lm/{k}": v for k, v in weights(base).items()})
    got = weights(tmp_path / "out")
    assert got.keys() == weights(base).keys() and all(torch.equal(got[k], expected[f"lm/{k}"]) for k in got)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "out/merge.json").read_text())["models"] == [str(base), *map(str, tuned)]
    assert "base" in (tmp_path / "out/README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight is not None
    assert (tmp_path / "out/chat_template.jinja").exists() or "chat_template" in (
        tmp_path / "out/tokenizer_config.json"
    ).read_text()


def test_no_base_is_needed_where_the_method_needs_none(lab, tmp_path):
    _, (_, a, b, _) = lab
    merge([str(a), str(b)], tmp_path / "arc", method={"merge.slerp": {"t": 0.0}}, certificate=False)
    assert all(torch.equal(v, weights(a)[k]) for k, v in weights(tmp_path / "arc").items())
    with pytest.raises(UserError, match="this method needs it"):
        planned([str(a), str(b)], "merge.ties")


def adapter(base, folder, seed, targets=("q_proj", "down_proj")):
    g = torch.Generator().manual_seed(seed)
    changes = {}
    for name, w in weights(base).items():
        if any(t in name for t in targets):
            A, B = 0.1 * torch.randn(2, w.shape[1], generator=g), 0.1 * torch.randn(w.shape[0], 2, generator=g)
            changes[f"lm/{name}"] = LowRank(A, B, scale=2.0)
    delta = Delta(changes, base=identity(str(base)))
    write_peft(delta, folder, base=str(base), base_model=str(base), task_type="CAUSAL_LM")
    return delta


def test_adapters_merge_to_models_and_to_adapters(lab, tmp_path):
    _, (base, a, *_) = lab
    deltas = [adapter(base, tmp_path / f"l{i}", i) for i in range(2)]
    specs = [str(tmp_path / f"l{i}") for i in range(2)]
    done = merge(specs, tmp_path / "model", method={"merge.linear": {"weights": [0.3, 0.7]}}, certificate=False)
    assert done["base"] == str(base)
    expected = (deltas[0] * 0.3 + deltas[1] * 0.7).apply({f"lm/{k}": v for k, v in weights(base).items()})
    for k, v in weights(tmp_path / "model").items():
        assert torch.allclose(v, expected[f"lm/{k}"], atol=1e-6), k
    done = merge(specs, tmp_path / "adapter", method={"merge.linear": {"weights": [0.3, 0.7]}}, as_="adapter")
    assert done["certificate"]["passed"]
    import peft

    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        a_, b_ = model(input_ids=ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "model")(input_ids=ids).logits
    assert torch.allclose(a_, b_, atol=1e-5)
    with pytest.raises(UserError, match="not low-rank"):
        merge(specs, tmp_path / "no", method={"merge.ties": {"density": 0.5}}, as_="adapter")
    assert not (tmp_path / "no").exists()
    merge([f"{base}+{tmp_path / 'l0'}", str(a)], tmp_path / "both", method="merge.linear", base=str(base), certificate=False)
    both = weights(tmp_path / "both")["model.norm.weight"]
    assert torch.allclose(both, (weights(base)["model.norm.weight"] + weights(a)["model.norm.weight"]) / 2)


def run_folder(base, folder, delta):
    (folder).mkdir()
    delta.save(folder / "delta")
    told = {"status": "done", "base": {"id": str(base), "sha256": dict(delta.base)}, "delta": {}}
    (folder / "run.json").write_text(json.dumps(told))
    return folder


def test_runs_merge_in_fp32_on_a_half_base(lab, tmp_path):
    base = tiny(tmp_path / "half", 1, dtype=torch.bfloat16)
    runs, changes = [], []
    for i in range(2):
        change = {f"lm/{k}": Dense(1e-4 * torch.randn(v.shape)) for k, v in weights(base).items()}
        changes.append(change)
        runs.append(str(run_folder(base, tmp_path / f"run{i}", Delta(change, base=identity(str(base))))))
    done = merge(runs, tmp_path / "out", method="merge.task_arithmetic", certificate=False)
    assert done["base"] == str(base)
    for k, v in weights(tmp_path / "out").items():
        assert v.dtype == torch.float32
        expected = weights(base)[k].float() + changes[0][f"lm/{k}"].d + changes[1][f"lm/{k}"].d
        assert torch.allclose(v, expected, atol=1e-7), k
    assert json.loads((tmp_path / "out/config.json").read_text()).get("dtype") in ("float32", None)
    merge(runs, tmp_path / "narrow", method="merge.task_arithmetic", dtype="bf16", certificate=False)
    assert weights(tmp_path / "narrow")["model.norm.weight"].dtype == torch.bfloat16


def test_tied_and_untied(lab, tmp_path):
    _, (base, a, *_) = lab
    untied = tiny(tmp_path / "untied", 3, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"lm_head.*tied"):
        planned([str(untied)], "merge.linear", str(base))
    copied = tmp_path / "twice"
    copied.mkdir()
    for f in a.iterdir():
        (copied / f.name).write_bytes(f.read_bytes())
    state = weights(a)
    save_file(
        state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, copied / "model.safetensors", {"format": "pt"}
    )
    merge([str(copied)], tmp_path / "out", method="merge.linear", base=str(base), certificate=False)
    assert "lm_head.weight" not in weights(tmp_path / "out")
    done = merge([str(a), str(untied)], tmp_path / "from-untied", method="merge.linear", base=str(untied))
    assert done["certificate"]["tied"] == [] and "lm_head.weight" in weights(tmp_path / "from-untied")


def test_slices_make_a_deeper_model(lab, tmp_path):
    _, (_, a, b, _) = lab
    cut = lambda model, last: {"sources": [{"model": str(model), "layer_range": [0, last]}]}
    document = {"merge_method": "passthrough", "slices": [cut(a, 2), cut(b, 3)]}
    done = merge(document, tmp_path / "deep")
    assert done["certificate"]["passed"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "deep").config.num_hidden_layers == 5
    got = weights(tmp_path / "deep")
    assert torch.equal(got["model.layers.4.mlp.up_proj.weight"], weights(b)["model.layers.2.mlp.up_proj.weight"])
    assert torch.equal(got["model.norm.weight"], weights(b)["model.norm.weight"])


def test_refusals_before_anything_is_written(lab, tmp_path):
    _, (base, a, b, _) = lab
    wide = tiny(tmp_path / "wide", 1, hidden_size=32)
    words = tiny(tmp_path / "words", 1, vocab_size=64)
    deep = tiny(tmp_path / "deep", 1, num_hidden_layers=4)
    broken = tiny(tmp_path / "broken", 1)
    state = weights(broken)
    state["model.norm.weight"][0] = float("nan")
    save_file(state, broken / "model.safetensors", {"format": "pt"})
    missing = tmp_path / "missing"
    LlamaForCausalLM.from_pretrained(a).save_pretrained(missing, max_shard_size="8KB")
    next(iter(sorted(missing.glob("*.safetensors"))[1:])).unlink()
    other = run_folder(base, tmp_path / "other", Delta({"lm/model.norm.weight": Dense(torch.ones(16))}, base={"lm": "0" * 64}))
    out = tmp_path / "never"
    yml = lambda **more: {"merge_method": "ties", "base_model": str(base), "models": [{"model": str(a)}], **more}
    for call, message in [
        (lambda: merge([str(wide)], out, base=str(base)), "differs from"),
        (lambda: merge([str(words)], out, base=str(base)), "another vocabulary"),
        (lambda: merge([str(deep)], out, base=str(base)), "has it and"),
        (lambda: merge([str(broken)], out, base=str(base)), "not all finite"),
        (lambda: merge([str(missing)], out, base=str(base)), "it is missing"),
        (lambda: merge([str(other)], out, base=str(base)), "another base"),
        (lambda: merge([str(tmp_path / "nothing")], out, base=str(base)), "no such folder"),
        (lambda: merge([], out), "name the models"),
        (lambda: merge([str(a)], out, base=str(base), method="merge.tie"), "did you mean 'merge.ties'"),
        (lambda: merge([str(a)], out, base=str(base), dtype="fp8"), "dtype"),
        (lambda: merge(yml(merge_method="tise"), out), "did you mean 'ties'"),
        (lambda: merge(yml(parameters={"densty": 1}), out), "densty.*did you mean 'density'"),
        (lambda: merge(yml(modles=[]), out), "did you mean.*'models'"),
        (lambda: merge(yml(dtype="float23"), out), "did you mean 'float32'"),
        (lambda: merge(yml(base_model=None), out), "base_model"),
        (lambda: merge(yml(slices=[]) | {"models": None}, out), "give models, or slices"),
        (lambda: merge(yml(slices=["a"]) | {"models": None}, out), r"slices\[0\]"),
        (lambda: merge(yml(slices=[{"sources": ["a"]}]) | {"models": None}, out), r"slices\[0\]"),
        (lambda: merge({"merge_method": "slerp", "base_model": str(base), "models": [str(a), str(b)]}, out), "with one other"),
        (lambda: merge(yml(tokenizer_source="elsewhere"), out), "union, base, or one"),
    ]:
        with pytest.raises(UserError, match=message):
            call()
        assert not out.exists() and not list(tmp_path.glob(".never*")), message


def architectures():
    import transformers as t

    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
    pictures, words = small | dict(image_size=16, patch_size=4), small | dict(vocab_size=64, max_position_embeddings=12)
    return {
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0)
        ),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**pictures, num_labels=5)),
        "clip": lambda: t.CLIPModel(
            t.CLIPConfig(text_config=words | {"eos_token_id": 2}, vision_config=pictures, projection_dim=8)
        ),
        "resnet": lambda: t.ResNetForImageClassification(
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, layer_type="basic")
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=4)),
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**words)),
        "policy": lambda: None,
    }


@pytest.mark.parametrize("kind", ["t5", "vit", "clip", "resnet", "gpt2", "bert", "policy"])
def test_every_kind_of_model_is_asked_what_it_takes(kind, tmp_path, monkeypatch):
    """Pictures, captions, what a decoder said before, no more tokens than there are positions; else the tensors alone."""
    from temperament.bases.probe import Answer
    from temperament.run import merge_certificate

    def reread(folder, inputs, expected, **how):
        base = merge_certificate.load(folder)
        with torch.no_grad():
            assert torch.equal(Answer(base)(**inputs), expected) and bool(expected.std() > 0)
        return {"passed": True}

    monkeypatch.setattr(merge_certificate, "certify", reread)
    if kind == "policy":
        done = merge(["lab/policy", "lab/policy"], tmp_path / "out", base="lab/policy")
        assert done["certificate"]["compared"] == "tensors" and "kind" in done["certificate"]["why"]
        return
    for i in range(3):
        torch.manual_seed(0)
        model = architectures()[kind]()
        for p in model.parameters():
            p.data += 0.02 * i * torch.randn(p.shape)
        model.save_pretrained(tmp_path / str(i))
    models = [str(tmp_path / str(i)) for i in range(3)]
    done = merge(models[1:], tmp_path / "out", base=models[0], method={"merge.ties": {"density": 0.5}})
    assert done["certificate"]["compared"] == "outputs"
    assert weights(tmp_path / "out").keys() == weights(models[0]).keys()


def test_what_is_written_is_looked_at_tensor_by_tensor(lab, tmp_path):
    _, (base, a, *_) = lab
    plan = planned([str(a)], base=str(base))
    merge([str(a)], tmp_path / "out", base=str(base), certificate=False)
    state = weights(tmp_path / "out")
    state["model.norm.weight"][3] += 1e-3
    save_file(state, tmp_path / "out/model.safetensors", {"format": "pt"})
    from temperament.run.merging import certified

    with pytest.raises(WorkFailed, match=r"model\.norm\.weight is not that of the merge"):
        certified(plan, tmp_path / "out")


def test_pipelines_are_refused_by_what_they_are(tmp_path):
    with pytest.raises(UserError, match="a pipeline of diffusers"):
        merge(["lab/unet"], tmp_path / "out", base="lab/unet")


def copied(folder, to, **config):
    shutil.copytree(folder, to)
    told = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(told | config))
    return to


def test_models_of_equal_shapes_that_read_them_differently(lab, tmp_path):
    _, (_, a, b, _) = lab
    out = tmp_path / "never"
    cut = copied(b, tmp_path / "cut", num_attention_heads=4, head_dim=4)
    turned = copied(b, tmp_path / "turned", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    far = copied(b, tmp_path / "far", rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0})
    older = copied(b, tmp_path / "older", rope_parameters=None, rope_theta=5e5)
    other = copied(b, tmp_path / "other", model_type="mistral")
    eyes = lambda heads: {"vision_config": {"num_attention_heads": heads}}
    inner, inside = copied(a, tmp_path / "inner", **eyes(3)), copied(b, tmp_path / "inside", **eyes(6))
    for one, model, message in [
        (a, cut, "num_attention_heads of .*cut is 4: .* has 2"),
        (a, turned, "rope_theta of .*turned is 500000.0: .* has 10000.0"),
        (a, far, "rope_type of .*far is 'linear': .* has 'default'"),
        (a, older, "rope_theta of .*older is 500000.0"),
        (a, other, "model_type of .*other is 'mistral': .* has 'llama'"),
        (inner, inside, r"vision_config\.num_attention_heads of .*inside is 6: .* has 3"),
    ]:
        document = {"merge_method": "linear", "models": [{"model": str(one)}, {"model": str(model)}]}
        for asked, how in (([str(one), str(model)], {"method": "merge.karcher"}), (document, {})):
            with pytest.raises(UserError, match=message):
                merge(asked, out, **how)
        assert not out.exists()
    planned([str(a), str(copied(b, tmp_path / "same", rope_parameters=None, rope_theta=10000))], "merge.karcher")


def test_one_number_a_token(lab, tmp_path):
    """Equal sizes do not tell; a source of the tokens does. A token that was added where the other has a spare row is none."""
    _, (_, a, b, _) = lab
    turned, other, grown = (copied(b, tmp_path / name) for name in ("turned", "other", "grown"))
    for folder, words in ((turned, WORDS[:2] + WORDS[:1:-1]), (other, WORDS[:2] + [f"v{i}" for i in range(46)])):
        tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(words)}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    with pytest.raises(UserError, match=r"vocabulary of .*turned: number of token 'w0' is 47: .*/a has 2"):
        planned([str(a), str(turned)], "merge.karcher")
    with pytest.raises(UserError, match=r"vocabulary of .*other: token 2 is 'v0': .*/a has 'w0'"):
        planned([str(a), str(other)], "merge.karcher")
    document = {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1}} for m in (a, turned)]}
    with pytest.raises(UserError, match="tokenizer_source"):
        planned(document)
    planned(document | {"tokenizer_source": "union"})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(grown)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(grown)
    planned([str(a), str(grown)], "merge.karcher")


@pytest.mark.parametrize("as_", ["merged", "adapter", "delta"])
def test_an_adapter_that_is_not_finite(lab, tmp_path, as_):
    _, (base, *_) = lab
    for i in range(2):
        adapter(base, tmp_path / f"l{i}", i)
    file = tmp_path / "l0/adapter_model.safetensors"
    state = load_file(file)
    broken = sorted(state)[0]
    state[broken][0, 0] = float("nan")
    save_file(state, file, {"format": "pt"})
    (tmp_path / "l0/delta.json").unlink()
    name = broken.removeprefix("base_model.model.").split(".lora")[0]
    with pytest.raises(UserError, match=f"a tensor of .*l0 is '{name}.weight': not all of its A is finite"):
        merge([str(tmp_path / "l0"), str(tmp_path / "l1")], tmp_path / "out", as_=as_)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base(lab, tmp_path):
    """Tensors say who a base is where both are here, names where both are of the hub; what lies elsewhere says nothing."""
    _, (base, a, *_) = lab
    adapter(base, tmp_path / "l", 0)
    (tmp_path / "l/delta.json").unlink()
    with pytest.raises(UserError, match=r"the base of .*/l is .*/a': it was made on .*/base; name that .*or merge"):
        planned([str(tmp_path / "l")], base=str(a))
    planned([str(tmp_path / "l")], base=str(shutil.copytree(base, tmp_path / "copy")))
    planned([f"{a}+{tmp_path / 'l'}"], base=str(a))  # said in so many words
    config = json.loads((tmp_path / "l/adapter_config.json").read_text())
    for named in ("/elsewhere/base", "org/other"):
        (tmp_path / "l/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
        planned([str(tmp_path / "l")], base=str(a))


def test_the_mean_needs_no_base(lab, tmp_path):
    _, (_, a, b, _) = lab
    done = merge([str(a), str(b)], tmp_path / "mean", certificate=False)
    assert done["base"] is None and done["method"]["merge.linear"]["of"] == "weights"
    for k, v in weights(tmp_path / "mean").items():
        assert torch.allclose(v, (weights(a)[k] + weights(b)[k]) / 2, atol=1e-7), k
    with pytest.raises(UserError, match="this method needs it"):
        planned([str(a), str(b)], {"merge.linear": {"normalise": False}})
    with pytest.raises(UserError, match=r"model is '.*nowhere': no such folder"):
        planned([str(a), str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"model is '.*nowhere': no such folder"):
        planned([str(a), str(tmp_path / "nowhere")], "merge.ties")


@pytest.mark.parametrize("method", [{"merge.compeft": {"density": 0.2}}, {"merge.half_reset": {"share": 0.5}},
                                    {"merge.passthrough": {"scale": 0.9}}, {"merge.sparse_sum": {"density": 0.3}}])  # fmt: skip
def test_one_merge_in_whatever_form_it_is_kept(lab, tmp_path, method):
    """An adapter changes some tensors, by its factors: the model written is base + the delta written."""
    _, (base, *_) = lab
    adapter(base, tmp_path / "l", 0)
    merge([str(tmp_path / "l")], tmp_path / "model", method=method, certificate=False)
    merge([str(tmp_path / "l")], tmp_path / "delta", method=method, as_="delta")
    expected = Delta.load(tmp_path / "delta").apply({f"lm/{k}": v for k, v in weights(base).items()})
    assert all(torch.allclose(v, expected[f"lm/{k}"], atol=1e-7) for k, v in weights(tmp_path / "model").items())


def test_memory_does_not_grow_with_the_models(tmp_path):
    """Peak of the tensors held, by counting what the passes ask for: blocks, not models."""
    import resource

    from temperament.delta.merge_run import stream
    from temperament.delta.stream import Checkpoint
    from temperament.delta.tensorfile import Entry, Writer, write_tensors

    shapes = {f"layers.{i}.w": (2048, 1024) for i in range(12)}
    for m in range(3):
        (tmp_path / str(m)).mkdir()
        write_tensors(tmp_path / str(m), {k: torch.randn(s) for k, s in shapes.items()}, shard_bytes=20_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sources = [Checkpoint(tmp_path / str(m)) for m in range(3)]
    with Writer(tmp_path, {k: Entry(torch.float32, s) for k, s in shapes.items()}) as writer:
        stream(parts.build("merge.ties"), sources[1:], sources[0], writer, threads=2)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 60, f"{grown:.0f} MB for models of 100 MB each"
