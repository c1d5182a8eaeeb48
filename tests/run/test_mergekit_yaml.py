"""A mergekit YAML is read as it is; what is wrong in it is one sentence before any model is opened or a folder made."""

import copy
import json
import math

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from temperament import parts
from temperament.cli import main
from temperament.errors import UserError
from temperament.run.chat_templates import NAMED
from temperament.run.mergekit_check import checked
from temperament.run.mergekit_yaml import is_mergekit, plan
from temperament.run.merging import merge
from tests.run.test_merging import tiny, weights


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("mergekit")
    return [str(tiny(root / name, seed)) for seed, name in enumerate(("base", "a", "b", "c"))]


def file(lab, method, *each, base=True, **more):
    models = [{"model": m, **({"parameters": p} if p else {})} for m, p in zip(lab[1:], each, strict=False)]
    return {"merge_method": method, "models": models} | ({"base_model": lab[0]} if base else {}) | more


def made(document, out):
    merge(document, out, certificate=False)
    return weights(out)


def close(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        assert torch.allclose(got[name], expected[name], atol=1e-6), name


# ---- read as mergekit reads it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, same", [(1.0, True), (1, True), (0, False), (0.0, False)])
def test_flags_are_also_numbers(lab, value, same):
    flagged = lambda v: plan(file(lab, "ties", {"weight": 1}, {"weight": 2}, parameters={"normalize": v, "int8_mask": 1.0}))
    assert flagged(value).jobs[0].method == flagged(same).jobs[0].method
    with pytest.raises(UserError, match="give true or false"):
        flagged(2)


def test_numbers_that_yaml_reads_as_words(lab):
    read = yaml.safe_load("{max_iter: 1e2, tol: 1e-9}")
    method = plan(file(lab, "karcher", None, None, base=False, parameters=read)).jobs[0].method
    assert (method.steps, method.tolerance) == (100, 1e-9)


def test_settings_of_the_whole_are_not_read_from_a_model(lab):
    document = file(lab, "task_arithmetic", {"weight": 0.5}, {"weight": 0.5, "lambda": 0.3}, parameters={"lambda": 1.1})
    assert plan(document).jobs[0].method.scale == 1.1
    assert any("models[1].parameters.lambda" in note for note in checked(document)[1])
    with pytest.raises(UserError, match="write it under the parameters at the top"):
        plan(file(lab, "nearswap", {"t": 0.1}))


def test_what_mergekit_does_not_read_is_a_note(lab):
    plain = file(lab, "task_arithmetic", {"weight": 0.5}, {"weight": 0.5})
    document = file(lab, "task_arithmetic", {"weight": 0.5, "density": 0.4}, {"weight": 0.5}, int8_mask=True, normalize=True)
    _, notes = checked(document)
    assert [n.split(" is ")[0] for n in notes] == ["int8_mask", "normalize", "models[0].parameters.density"]
    assert plan(document).jobs[0].method == plan(plain).jobs[0].method


def test_nuslerp_is_slerp_by_weights(lab, tmp_path):
    each = {"weight": 0.6}, {"weight": 0.2}
    base, a, b = (weights(m) for m in lab[:3])
    for under, centre in [(False, 0.0), (True, 1.0)]:
        expected = {}
        for name in base:
            x, y = (w[name].double() - centre * base[name].double() for w in (a, b))
            angle = math.acos(float((x * y).sum() / (x.norm() * y.norm())))
            turned = (math.sin(0.75 * angle) * x + math.sin(0.25 * angle) * y) / math.sin(angle)
            expected[name] = (centre * base[name].double() + turned).float()
        close(made(file(lab, "nuslerp", *each, base=under), tmp_path / str(under)), expected)
    for wrong, why in [
        (file(lab, "nuslerp", {"weight": 1}, {"weight": 1}, {"weight": 1}), "joins two models"),
        (file(lab, "nuslerp", *each, parameters={"nuslerp_flatten": False}), "turned whole"),
        (file(lab, "arcee_fusion", None, None), "methods read here: linear, slerp, nuslerp, nearswap"),
    ]:
        with pytest.raises(UserError, match=why):
            plan(wrong)


def test_nearswap_is_a_clipped_change(lab, tmp_path):
    base, a = (weights(m) for m in lab[:2])
    got = made(file(lab, "nearswap", None, parameters={"t": 0.01}), tmp_path / "near")
    for name in base:
        x = (a[name] - base[name]).double()
        w = torch.nan_to_num(0.01 / x.abs(), nan=1.0, posinf=1.0).clamp(0, 1)
        assert torch.allclose(got[name].double(), base[name] + w * x, atol=1e-7)
    close(made(file(lab, "nearswap", None, parameters={"t": 9.0}), tmp_path / "all"), a)


# ---- chat templates --------------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}, {"role": "user", "content": "again"}]
SAID = {
    "chatml": "<|im_start|>user\nping<|im_end|>\n<|im_start|>assistant\npong<|im_end|>\n<|im_start|>user\nagain<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nping<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "pong<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nagain<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] ping [/INST] pong</s>[INST] again [/INST]",
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nping\n\n### Response:\npong</s>\n\n### Instruction:\nagain\n\n### Response:\n",
    "exaone": "[|system|][|endofturn|]\n[|user|]ping\n[|assistant|]pong[|endofturn|]\n[|user|]again\n[|assistant|]",
}


@pytest.mark.parametrize("name", NAMED)
def test_named_templates(name):
    from transformers.utils.chat_template_utils import render_jinja_template

    said, _ = render_jinja_template(
        [CHAT], chat_template=NAMED[name], add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert said == [SAID[name]]


def test_templates_are_chosen_before_anything_is_written(lab, tmp_path):
    from transformers import AutoTokenizer

    document = file(lab, "linear", {"weight": 1}, {"weight": 1}, base=False)
    done = merge(document | {"chat_template": "chatml"}, tmp_path / "chatml")
    assert done["certificate"]["passed"]
    assert AutoTokenizer.from_pretrained(tmp_path / "chatml").chat_template == NAMED["chatml"]
    common = [tiny(tmp_path / f"t{i}", i) for i in range(3)]
    for folder in common[:2]:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = "{{ messages[0]['content'] }}!"
        tokenizer.save_pretrained(folder)
    models = [{"model": str(m)} for m in (common[2], *common[:2])]
    auto = plan({"merge_method": "linear", "models": models, "chat_template": "auto"})
    assert auto.tokenizer.chat_template == "{{ messages[0]['content'] }}!"
    for wrong in ("chatlm", "{{ messages"):
        with pytest.raises(UserError, match="chat_template"):
            merge(document | {"chat_template": wrong}, tmp_path / "never")
        assert not (tmp_path / "never").exists()


# ---- what is wrong is one sentence -----------------------------------------------------------------------------------------


def test_a_misspelt_method_key_is_still_a_merge_file(lab, tmp_path, capsys):
    path = tmp_path / "m.yml"
    path.write_text(yaml.safe_dump({"merge_methd": "linear", "models": lab[1:]}))
    assert is_mergekit(path) and not is_mergekit({"base": "lab/lm", "steps": []})
    assert main(["merge", str(path), "--out", str(tmp_path / "o")]) == 2
    assert "merge_methd" in (said := capsys.readouterr().err) and "did you mean 'merge_method'" in said


SETTING = {"weight": [{"filter": "mlp", "value": [0.5, 1]}, {"value": 0.5}]}
VALID = [
    {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 0.5, "density": [0.3, 0.7]}}, {"model": "b", "parameters": SETTING}],
        "parameters": {"normalize": True, "lambda": 1.1},
        "dtype": "float32",
        "tokenizer": {"source": "union", "tokens": {"x": {"source": "a", "force": True}}, "pad_to_multiple_of": 8},
        "chat_template": "auto",
    },
    {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 2], "parameters": {"scale": 0.5}}], "parameters": {"scale": 1.0}},
            {"sources": [{"model": {"model": {"path": "b"}}, "layer_range": [1, 3]}]},
        ],
        "tokenizer_source": "base",
    },
    {"merge_method": "slerp", "base_model": "a", "modules": {"default": {"models": [{"model": "a"}, {"model": "b"}]}},
     "parameters": {"t": [{"filter": "attn", "value": [0, 1]}, {"value": 0.5}]}},
]  # fmt: skip


def places(value, at=()):
    """Every key of every mapping, and every value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*at, key)
        yield from places(item, (*at, key))


FREE = {"tokens", "modules"}  # what lies right under these is a name of the user's


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_slip_anywhere_is_one_sentence(data, tmp_path):
    document = copy.deepcopy(data.draw(st.sampled_from(VALID)))
    *above, key = data.draw(st.sampled_from(list(places(document))))
    holder = document
    for step in above:
        holder = holder[step]
    if isinstance(key, str) and not (above and above[-1] in FREE) and data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(key) - 1))
        slip = key[:cut] + data.draw(st.sampled_from(["", "zq"])) + key[cut + 1 :]
        holder[slip or "zq"] = holder.pop(key)
    else:
        wrong = [object(), 3.5j, b"x", [[]], [{}], {"zq": 1}, {1: 2}, math.nan, math.inf]
        holder[key] = data.draw(st.sampled_from(wrong))
    with pytest.raises(UserError) as told:
        merge(document, tmp_path / "out")
    assert "\n" not in str(told.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "slip, field",
    [
        ({"models": "/path"}, "models"),
        ({"models": [{"model": "a", "paramters": {}}]}, r"models\[0\].paramters.*'parameters'"),
        ({"models": [{"model": "a", "weight": 1}]}, "write it under parameters"),
        ({"models": [{"model": "a", "parameters": [1]}]}, r"models\[0\].parameters"),
        ({"parameters": {"weight": "half"}}, "parameters.weight"),
        ({"parameters": {"weight": math.nan}}, "parameters.weight is nan"),
        ({"tokenizer": "union"}, "tokenizer_source: union"),
        ({"tokenizer": {"source": "union", "tokens": ["a"]}}, "tokenizer.tokens"),
        ({"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [0.0, 2.5]}]}]}, "layer_range"),
        ({"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [0, 2], "paramters": {}}]}]}, "paramters"),
        ({"models": None, "slices": [{"paramters": {}, "sources": []}]}, r"slices\[0\].paramters"),
        ({"random_sed": 1}, "random_sed"),
    ],
)
def test_slips(slip, field):
    with pytest.raises(UserError, match=field):
        checked({"merge_method": "linear", "models": ["a", "b"]} | slip)


def test_the_valid_ones_are_valid(lab):
    for document in VALID:
        assert checked(document)[1] == []
    method = plan(file(lab[1:], "slerp", None) | {"parameters": VALID[2]["parameters"]}).jobs[0].method
    assert method.t == VALID[2]["parameters"]["t"]


def test_layer_ranges_may_be_words():
    cut = lambda span: {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": span}]}]}
    assert checked(cut(["0", "2"]))[0] == checked(cut([0.0, 2]))[0] == checked(cut([0, 2]))[0]


# ---- options out of range --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ties", "dare", "della", "breadcrumbs", "sce"])
@pytest.mark.parametrize("density", [0, 1.5, -0.5, math.nan, "x", [0.5, 2], [[0.5, -1]], [{"filter": "mlp", "value": 3}]])
def test_density_out_of_range(name, density):
    with pytest.raises(UserError, match=f"merge.{name}.density"):
        parts.build({f"merge.{name}": {"density": density}})
    parts.build({f"merge.{name}": {"density": [{"filter": "mlp", "value": [0.2, "1e-2"]}, {"value": 1}]}})


@pytest.mark.parametrize(
    "name, option, value",
    [
        ("breadcrumbs", "gamma", -0.2),
        ("breadcrumbs", "gamma", 1.0),
        ("della", "epsilon", -0.1),
        ("slerp", "t", math.inf),
        ("nearswap", "t", 0.0),
        *[(n, "weights", [1.0, math.nan]) for n in ("linear", "ties", "dare", "della", "task_arithmetic", "multislerp")],
        *[(n, "scale", math.inf) for n in ("linear", "ties", "dare", "breadcrumbs")],
    ],
)
def test_options_out_of_range(name, option, value):
    with pytest.raises(UserError, match=f"merge.{name}.{option}"):
        parts.build({f"merge.{name}": {option: value}})


# ---- the command line ------------------------------------------------------------------------------------------------------


def told(capsys, *words):
    capsys.readouterr()
    code = main([str(w) for w in words])
    return code, capsys.readouterr()


@pytest.mark.parametrize(
    "option, value",
    [
        ("--method", "merge.nosuch"),
        ("--base", "/nowhere"),
        ("--search", 5),
        ("--budget", 0.1),
        ("--items", 9),
        ("--as", "adapter"),
        ("--suite", "{evaluate.nosuch: {}}"),
    ],
)
def test_options_beside_a_file_are_meant_or_refused(lab, tmp_path, capsys, option, value):
    path = tmp_path / "k.yml"
    path.write_text(yaml.safe_dump(file(lab, "karcher", None, None, base=False)))
    code, said = told(capsys, "merge", path, option, value, "--out", tmp_path / "o")
    assert code == 2 and option.lstrip("-") in said.err and not (tmp_path / "o").exists()
    path.write_text(yaml.safe_dump({"base": "lab/lm", "steps": []}))
    code, said = told(capsys, "merge", path, option, value, "--out", tmp_path / "o")
    assert code == 2 and option in said.err and not (tmp_path / "o").exists()


def test_a_file_as_a_delta(lab, tmp_path, capsys):
    path = tmp_path / "t.yml"
    path.write_text(yaml.safe_dump(file(lab, "task_arithmetic", {"weight": 0.5}, {"weight": 0.5}, int8_mask=True)))
    code, said = told(capsys, "merge", path, "--as", "delta", "--json", "--out", tmp_path / "d")
    assert code == 0 and json.loads(said.out)["as"] == "delta" and "int8_mask is not read" in said.err
    assert (tmp_path / "d/delta.json").exists()


def test_several_merges_in_a_file(lab, tmp_path, capsys):
    path, out = tmp_path / "m.yml", tmp_path / "out"
    first = file(lab, "linear", {"weight": 0.5}, {"weight": 0.5}, base=False, name="first")
    second = {"merge_method": "slerp", "base_model": "first", "models": ["first", lab[3]], "parameters": {"t": 0.5}}
    path.write_text(yaml.safe_dump_all([first, second | {"parameters": {"t": [1, "x"]}}]))
    assert told(capsys, "merge", path, "--out", out)[0] == 2 and list(tmp_path.iterdir()) == [path]
    path.write_text(yaml.safe_dump_all([first, second | {"models": ["first", "nowhere"]}]))
    assert told(capsys, "merge", path, "--out", out)[0] == 2 and list(tmp_path.iterdir()) == [path]
    path.write_text(yaml.safe_dump_all([first, second]))
    code, said = told(capsys, "merge", path, "--out", out)
    assert code == 0, said.err
    inner = made(first, tmp_path / "inner")
    close(weights(tmp_path / "out.parts/first"), inner)
    close(weights(out), made(second | {"base_model": str(tmp_path / "inner"), "models": [str(tmp_path / "inner"), lab[3]]},
                             tmp_path / "outer"))  # fmt: skip


def test_errors_are_json_whatever_the_value(lab, tmp_path, capsys):
    path = tmp_path / "n.yml"
    path.write_text(yaml.safe_dump(file(lab, "linear", {"weight": math.nan}, None, base=False)))
    code, said = told(capsys, "merge", path, "--json", "--out", tmp_path / "o")
    strict = json.loads(said.out, parse_constant=lambda word: pytest.fail(word))
    assert code == 2 and strict["field"] == "models[0].parameters.weight" and strict["value"] == "nan"


def test_extract_refuses_what_its_kind_has_not(capsys):
    for words in (["--kind", "ternary", "--rank", 3], ["--density", 0.1]):
        code, said = told(capsys, "extract", "a", "--base", "b", *words, "--out", "c")
        assert code == 2 and words[-2] in said.err
