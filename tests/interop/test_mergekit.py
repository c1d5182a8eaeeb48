"""Equal to mergekit on random checkpoints: the same YAML to both, outputs compared tensor by tensor.

mergekit is run by the Python that has it: TEMPER_MERGEKIT_PYTHON=/path/to/python, this one, or .venv-mergekit, which
`python -m benchmarks.mergekit` makes.
"""
# ruff: noqa: E501  (a table reads best with a row a line)

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from temperament.run.merging import merge

OWN = Path(__file__).resolve().parents[2] / ".venv-mergekit/bin/python"


def mergekit_python():
    for python in (os.environ.get("TEMPER_MERGEKIT_PYTHON"), sys.executable, OWN):
        there = python and Path(python).exists()
        if there and subprocess.run([python, "-c", "import mergekit.merge"], capture_output=True).returncode == 0:
            return str(python)
    return None


PYTHON = mergekit_python()
pytestmark = pytest.mark.skipif(PYTHON is None, reason="mergekit is not installed: `python -m benchmarks.mergekit` installs it")

W = {"weight": 0.6}
GRADIENT = [0.1, 1.0, 0.4]
RULES = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]


def three(method, first=None, second=None, third=None, base=True, **whole):
    pairs = zip("abc", (first, second, third), strict=True)
    listed = [{"model": m, **({"parameters": p} if p else {})} for m, p in pairs if p is not False]
    return {
        "merge_method": method,
        "models": listed,
        **({"base_model": "base"} if base else {}),
        **({"parameters": whole} if whole else {}),
    }


EXACT = {
    "linear": three("linear", W, {"weight": 0.3}, {"weight": 0.2}, base=False),
    "linear-sum": three("linear", W, {"weight": -0.3}, {"weight": GRADIENT}, base=False, normalize=False),
    "task-arithmetic": three("task_arithmetic", W, {"weight": 0.3}, {"weight": RULES}, **{"lambda": 0.7}),
    "ties": three("ties", W, {"weight": 0.3}, W, density=0.4),
    "ties-gradient": three("ties", {"weight": GRADIENT, "density": [1, 0.2]}, W, False, density=0.7, normalize=False),
    "ties-rules": three("ties", {"weight": RULES, "density": RULES[:2]}, W, W, density=0.5, **{"lambda": 1.3}),
    "breadcrumbs": three("breadcrumbs", W, W, {"weight": 0.1}, density=0.6, gamma=0.02),
    "breadcrumbs-ties": three("breadcrumbs_ties", W, W, {"weight": 0.1}, density=0.9, gamma=0.05, normalize=True),
    "dare-all": three("dare_ties", W, W, W, density=1.0),
    "model-stock": three("model_stock"),
    "model-stock-rows": three("model_stock", filter_wise=True),
    "karcher": three("karcher", base=False),
    "multislerp": three("multislerp", W, W, {"weight": 0.2}),
    "multislerp-zero": three("multislerp", W, W, {"weight": 0.2}, base=False),
    "sce": three("sce"),
    "sce-select": three("sce", select_topk=0.3),
    "slerp": {"merge_method": "slerp", "base_model": "a", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"t": RULES}},
    "slerp-far": {"merge_method": "slerp", "base_model": "far", "models": [{"model": "a"}, {"model": "far"}], "parameters": {"t": 0.3}},
    "nuslerp": three("nuslerp", W, {"weight": 0.2}, False, base=False),
    "nuslerp-about-base": three("nuslerp", W, {"weight": GRADIENT}, False),
    "nearswap": {"merge_method": "nearswap", "base_model": "a", "models": [{"model": "b"}], "parameters": {"t": 0.02}},
    "flags-as-numbers": three("ties", W, W, False, density=0.4, normalize=1.0, int8_mask=1.0),
    "slices": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 3]}]},
            {"sources": [{"model": "b", "layer_range": [1, 4], "parameters": {"scale": [{"filter": "o_proj", "value": 0.5}, {"value": 1.0}]}}]},
        ],
    },
    "slices-linear": {
        "merge_method": "linear",
        "parameters": {"weight": 0.5},
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 2], "parameters": {"weight": 0.3}}, {"model": "b", "layer_range": [0, 2]}]},
            {"sources": [{"model": "b", "layer_range": [1, 4]}, {"model": "c", "layer_range": [0, 3], "parameters": {"weight": [0.1, 0.9]}}]},
        ],
    },
    "untied": three("ties", W, W, False, density=0.5) | {"base_model": "untied0", "models": [
        {"model": "untied1", "parameters": W}, {"model": "untied2", "parameters": {"weight": 0.2}}]},
    "adapter": {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "a+lora", "parameters": W}]},
    "union": three("linear", W, {"weight": 0.4}, False, base=False) | {"tokenizer_source": "union", "models": [
        {"model": "v0", "parameters": W}, {"model": "v1", "parameters": {"weight": 0.4}}], "base_model": "v0"},
    "vocabulary-of-base": three("task_arithmetic", W) | {"tokenizer_source": "base", "base_model": "v0",
                                                         "models": [{"model": "v1", "parameters": W}]},
    "half": three("linear", W, W, W, base=False) | {"out_dtype": "bfloat16"},
}  # fmt: skip
CHANCE = {
    "dare-linear": three("dare_linear", {"weight": 1.0}, False, False, density=0.3),
    "dare-ties": three("dare_ties", W, W, W, density=0.6),
    # they rescale a tensor as a whole, we each entry by its own probability, as the paper does
    "della-linear": three("della_linear", {"weight": 1.0}, False, False, density=0.5, epsilon=0.2, rescale=False),
}


def words(tokens):
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def tiny(folder, seed, like=None, size=0.02, vocabulary=96, tied=True):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, tie_word_embeddings=tied)  # fmt: skip
    model = LlamaForCausalLM(config)
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += size * torch.randn(p.shape, generator=g)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{name: (our folder, their folder)}, all of theirs in one process."""
    import peft

    root = tmp_path_factory.mktemp("mergekit")
    common = ["<unk>", "</s>"] + [f"w{i}" for i in range(94)]
    for seed, name in enumerate(["base", "a", "b", "c"]):
        tiny(root / name, seed, size=0.02 if seed else 0.0)
        words(common).save_pretrained(root / name)
    tiny(root / "far", 9, size=0.5)
    for seed in range(3):
        tiny(root / f"untied{seed}", 20 + seed, tied=False)
    for seed, tokens in enumerate([["<unk>", "</s>", "x", "y", "z"], ["<unk>", "</s>", "z", "q", "x", "r"]]):
        tiny(root / f"v{seed}", 30 + seed, vocabulary=len(tokens))
        words(tokens).save_pretrained(root / f"v{seed}")
    lora = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(root / "a"), peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"])
    )
    for n, p in lora.named_parameters():
        if "lora_" in n:
            p.data = 0.1 * torch.randn(p.shape)
    lora.save_pretrained(root / "lora")
    jobs, out = [], {}
    for name, document in (EXACT | CHANCE).items():
        text = yaml.safe_dump({"dtype": "float32", **document})
        named = yaml.safe_load(text)

        def there(value):
            if isinstance(value, dict):
                return {k: _model(v, root) if k in ("model", "base_model") else there(v) for k, v in value.items()}
            return [there(v) for v in value] if isinstance(value, list) else value

        config = root / f"{name}.yml"
        config.write_text(yaml.safe_dump(there(named)))
        jobs.append([str(config), str(root / f"theirs-{name}")])
        out[name] = config, root / f"ours-{name}", root / f"theirs-{name}"
    (root / "jobs.json").write_text(json.dumps(jobs))
    runner = Path(__file__).parent / "mergekit_runner.py"
    run = subprocess.run([PYTHON, str(runner), str(root / "jobs.json")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return out


def _model(spec, root):
    return "+".join(str(root / s) for s in spec.split("+"))


def both(made, name):
    config, ours, theirs = made[name]
    merge(str(config), ours, certificate=False)
    load = lambda folder: {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}
    return load(ours), load(theirs)


@pytest.mark.parametrize("name", EXACT)
def test_equal(made, name):
    a, b = both(made, name)
    assert a.keys() == b.keys()
    if name == "union":  # new tokens come in no fixed order there
        ours, theirs = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in made[name][1:])
        assert ours.keys() == theirs.keys()
        order = [theirs[t] for t, _ in sorted(ours.items(), key=lambda item: item[1])]
        b["model.embed_tokens.weight"] = b["model.embed_tokens.weight"][order]
    for k in a:
        assert a[k].dtype == b[k].dtype and a[k].shape == b[k].shape, k
        x, y = a[k].double(), b[k].double()
        tolerance = 1e-2 if a[k].dtype == torch.bfloat16 else 1e-6
        assert float((x - y).norm()) <= tolerance * float(y.norm()), (k, float((x - y).norm() / y.norm()))
        assert torch.allclose(x, y, rtol=10 * tolerance, atol=tolerance * float(y.abs().max())), k


@pytest.mark.parametrize("name", CHANCE)
def test_equal_in_distribution(made, name):
    a, b = both(made, name)
    base = load_file(made[name][0].parent / "base" / "model.safetensors")
    x, y = (torch.cat([(s[k] - base[k]).flatten() for k in sorted(base)]).double() for s in (a, b))
    assert not torch.equal(x, y)
    n = len(x)
    assert abs(float((x != 0).double().mean() - (y != 0).double().mean())) < 5 / n**0.5
    assert abs(float(x.std() / y.std()) - 1) < 0.03 and abs(float(x.mean() - y.mean())) < 5 * float(y.std()) / n**0.5
    for q in (0.05, 0.25, 0.75, 0.95):
        assert abs(float(x.quantile(q) - y.quantile(q))) < 0.08 * float(y.std()), q


def test_certified_with_its_tokenizer(made):
    config, ours, _ = made["union"]
    done = merge(str(config), ours.with_name("certified"))
    assert done["certificate"]["passed"] and done["certificate"]["tied"] == ["lm/lm_head.weight"]
