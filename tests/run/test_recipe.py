"""Recipes: read strictly, every default shown, names and references settled before a model is loaded."""

import copy
import secrets

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from temperament.errors import UserError
from temperament.run.recipe import LIMIT, read, unrolled, walk_steps

LAB = {"data.lab": {"skills": ["shift"], "rows": 8}}
TRAIN = {"source": LAB, "steps": 3}
TEXT = """
base: lab/lm
steps:
  - name: sft
    train:
      source: {data.lab: {skills: [shift]}}
      optimizer: {optim.adamw: {lr: 1e-4}}
      steps: 20
"""


def recipe(*steps, **more):
    return {"base": "lab/lm", "steps": list(steps), **more}


def train(name="", **more):
    step = {k: more.pop(k) for k in ("start", "ledger", "when") if k in more}
    return {"name": name, "train": {**TRAIN, **more}, **step}


def refused(source, *overrides) -> str:
    with pytest.raises(UserError) as problem:
        read(source, overrides)
    assert "\n" not in str(problem.value) and problem.value.exit_code == 2
    return str(problem.value)


@pytest.fixture
def write(tmp_path):
    def at(text, name="r.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return at


# ---- YAML
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.e-4", "+1e-4", "0.0001", ".1e-3", "1.0e-4"])
def test_numbers_are_numbers(write, number):
    assert read(write(TEXT.replace("1e-4", number))).steps[0].train.optimizer.lr == 1e-4


def test_a_recipe_is_a_file_a_folder_a_mapping_or_itself(write, tmp_path):
    one = read(write(TEXT, "recipe.yaml"))
    assert read(tmp_path) == one == read(yaml.safe_load(TEXT.replace("1e-4", "0.0001"))) == read(one)
    assert read(write(("﻿" + TEXT).encode(), "bom.yaml")) == one and read(write(TEXT.replace("\n", "\r\n"), "crlf.yaml")) == one


@pytest.mark.parametrize(
    "text, why",
    [
        ("base: &a lab/lm\nsteps: [*a]", "aliases"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "aliases"),
        ("base: x\nbase: y", "the key 'base' stands twice"),
        ("base: {a: 1, a: 2}", "twice"),
        ("base:\tlab/lm\n\tsteps: []", "no plain YAML"),
        ("base: [", "no plain YAML"),
        ("- base", "a recipe is a mapping"),
        ("just text", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("1: 2", "a recipe is a mapping"),
        ("? [a, b]\n: 1", "a key is a word"),
        ("{[1]: 2}", "a key is a word"),
        ("base: !!python/object/apply:os.system [echo]", "no plain YAML"),
        ("base: !!int x", "no plain YAML"),
        ("base: !!bool 7", "no plain YAML"),
        ("base: !!timestamp x", "no plain YAML"),
        ("base: !!binary 'é'", "no plain YAML"),
        ("base: !!int ''", "no plain YAML"),
        ("<<: 3", ""),
        ("base: " + "9" * 6000, ""),
        ("a: " + "[" * 3000, "no plain YAML"),
        (b"base: \xff\xfe", "not UTF-8"),
        (b"\x00\x01", ""),
        ("#" + "x" * LIMIT, "larger than 1 MiB"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_what_is_no_plain_yaml_is_a_sentence(write, text, why):
    assert why in refused(write(text))


def test_missing_files(tmp_path):
    assert "no such file" in refused(tmp_path / "none.yaml") and "could not be read" in refused(tmp_path)


def test_dates_stay_words(write):
    assert read(write(TEXT.replace("sft", "2024-01-02"))).names() == ["2024-01-02"]


# ---- resolving
# -----------------------------------------------------------------------------------------------------------------

RICH = recipe(
    train(
        "a",
        trainable=["select.half", {"adapters.lora": {"rank": 4}}],
        regularizers="regularizers.kl",
        stop={"reach": 0.5},
        ema=0.9,
        keep="ema",
    ),
    train(
        "b",
        source={"rollout.sample": {"prompts": LAB, "rewards": ["rewards.lab"]}},
        objective={"Rollout": "objectives.policy.grpo"},
        optimizer={"optim.adamw": {"lr": {"schedules.cosine": {"peak": 1e-3, "warmup": 2}}}},
        start="base",
    ),
    {"merge": {"method": {"merge.lines": {"of": "merge.linear"}}, "of": ["a", "b"]}},
    {"name": "r", "rounds": {"times": 2, "until": {"above": 0.9}, "steps": [train("x"), train(start="x")]}},
    {
        "name": "f",
        "foreach": {
            "values": {"s": ["shift", "copy"], "n": [1, 2]},
            "steps": [{"train": {"source": {"data.lab": {"skills": ["{s}"]}}, "steps": "{n}"}}],
        },
    },
    {"measure": True, "when": {"skill": "target", "below": 0.5}},
    inference=["decode.repetition_penalty"],
    evaluation={"dial": {}, "suites": [{"evaluate.lab": {"target": "shift"}}]},
)


def test_the_resolved_recipe_shows_every_default_and_reads_back(write):
    one = read(RICH)
    shown = yaml.safe_load(one.yaml())
    again = read(write(one.yaml()))
    assert again == one and again.yaml() == one.yaml() and again.plain() == shown
    step = shown["steps"][0]["train"]
    assert (
        step["clip"] == 1.0
        and step["save"] == {"seconds": 60.0, "steps": 0, "keep": 2}
        and step["objective"] == {"objectives.sft.cross_entropy": {"per": "token"}}
    )
    assert (
        step["trainable"][1]["adapters.lora"]["dropout"] == 0.0
        and step["regularizers"][0]["regularizers.kl"]["version"] == "base"
    )
    assert (
        shown["evaluation"]["dial"]["budget"] == 0.5
        and shown["precision"] == {"compute": "fp32", "master": "fp32"}
        and shown["seed"] == 0
    )
    assert one.names() == ["a", "b", "merge-3", "r", "f", "measure-6"]
    assert [s.name for s in one.steps[3].rounds.steps] == ["x", "train-2"]


def test_reading_changes_nothing_of_what_was_given():
    given = copy.deepcopy(RICH)
    read(given, ["a.train.steps=9", "a.train.optimizer.optim.adamw.lr=3"])
    assert given == RICH


def test_names_inside_of_steps_are_told_apart_and_followed():
    one = read(RICH)
    flat = unrolled(one.steps[4])
    assert [s.name for s in flat] == ["f.1.train-1", "f.2.train-1"] and [s.train.steps for s in flat] == [1, 2]
    assert [s.train.source.skills for s in flat] == [["shift"], ["copy"]]
    assert [s.name for s in walk_steps(one.steps)][3:] == ["r", "x", "train-2", "f", "f.1.train-1", "f.2.train-1", "measure-6"]
    two = {
        "name": "f",
        "foreach": {
            "values": {"n": [1, 2]},
            "steps": [
                train("a"),
                train("b", start="a"),
                train(start="base"),
                {"merge": {"method": "merge.linear", "of": ["a", "b"]}},
            ],
        },
    }
    flat = unrolled(read(recipe(two)).steps[0])
    assert [s.name for s in flat[:4]] == ["f.1.a", "f.1.b", "f.1.train-3", "f.1.merge-4"]
    assert flat[5].start == "f.2.a" and flat[6].start == "base" and flat[7].merge.of == ["f.2.a", "f.2.b"]


@pytest.mark.parametrize(
    "broken, why",
    [
        (recipe(train("a"), train("a")), "steps[1].name is 'a': already taken"),
        (recipe(train("base")), "already taken"),
        (recipe(train("../x")), "becomes a folder"),
        (recipe(train("a/b")), "becomes a folder"),
        (recipe(train("x" * 80)), "at most 64"),
        (recipe(train("a", start="b"), train("b")), "steps[0].start is 'b': not a step before this one"),
        (recipe(train("sft"), train("b", start="stf")), "did you mean 'sft'"),
        (
            recipe({"name": "r", "rounds": {"times": 1, "steps": [train("x"), train("x")]}}),
            "steps[0].rounds.steps[1].name is 'x'",
        ),
        (
            recipe({"name": "r", "rounds": {"times": 1, "steps": [train("x", start="y")]}}),
            "steps[0].rounds.steps[0].start is 'y'",
        ),
        (
            recipe({"name": "r", "rounds": {"times": 1, "steps": [train("x")]}}, train("r.1.x")),
            "belong to the steps inside of 'r'",
        ),
        (recipe({"foreach": {"values": {"a": [1], "b": [1, 2]}, "steps": [train()]}}), "same length"),
        (recipe({"foreach": {"values": {}, "steps": [train()]}}), "at least one list"),
        (recipe({"foreach": {"values": {"a": []}, "steps": [train()]}}), "at least one"),
        (recipe({"foreach": {"values": {"a": [1]}, "steps": [{"trian": {}}]}}), "trian"),
        (recipe({"foreach": {"values": {"a": [1]}, "steps": [train("x", start="y")]}}), "foreach.steps[0].start is 'y'"),
        (recipe({"merge": {"method": "merge.linear", "of": ["nowhere"]}}), "steps[0].merge.of is 'nowhere': neither a step"),
        (recipe({}), "exactly one of"),
        (recipe({"train": TRAIN, "measure": True}), "train and measure"),
        (recipe(train(epochs=1)), "either steps or epochs"),
        (recipe({"train": {"source": LAB}}), "either steps or epochs"),
        (recipe(train(batch=0)), "batch must be at least 1"),
        (recipe(train(steps=-1)), "must not be negative"),
        (recipe(train(keep="ema")), "train.keep is 'ema'"),
        (recipe(train(keep="best")), "train.keep is 'best'"),
        (recipe(train(keep="last")), "keep is 'last'"),
        (recipe(train(objective={"objectives.preference.dpo": {"reference": "previous"}})), "holds the versions live, base"),
        (recipe(train(regularizers=[{"regularizers.kl": {"version": "bast"}}])), "did you mean 'best' or 'base'"),
        (recipe(train(regularizers=[{"regularizers.kl": {"version": "best"}}])), "with keep: best"),
        (recipe(train(regularizers=[{"regularizers.kl": {"version": "ema"}}])), "train.ema is None: a part reads"),
        (recipe(train(regularizers=[{"regularizers.kl": {"version": "critic:start"}}])), "no player is called so"),
        (recipe(train(trainable="objectives.preference.dpo")), "takes a part of select or adapters"),
        (recipe(train(trainable=[])), "trainable"),
        (recipe(train(stop={"every": 0})), "every must be at least 1"),
        (recipe(train(save={"keep": 0})), "keep must be at least 1"),
        (recipe(base=3), "base is 3"),
        (recipe(seeed=3), "did you mean 'seed'"),
        ({"steps": []}, "base is None: required"),
        (recipe(steps=3), "steps is 3"),
        (recipe(seed="0"), "seed is '0'"),
        (recipe(evaluation={"suites": ["merge.linear"]}), "takes a part of evaluate"),
        (recipe({"name": "r", "rounds": {"times": -1, "steps": [train()]}}), "times must be at least 0"),
        (recipe({"name": "r", "rounds": {"times": 2, "steps": []}}), "at least one step"),
    ],
    ids=lambda v: v[:40] if isinstance(v, str) else "",
)
def test_what_cannot_be_is_named(broken, why):
    assert why in refused(broken)


# ---- overrides
# -----------------------------------------------------------------------------------------------------------------


def test_overrides_by_place_name_and_part():
    base = recipe(
        train("sft", optimizer="optim.adamw"), train("v1.2", trainable=[{"adapters.lora": {"rank": 4}}]), {"measure": True}
    )
    rate = secrets.randbelow(1000) / 7 + 1e-6
    got = read(
        base,
        [
            "seed=7",
            "sft.train.steps=50",
            f"steps.0.train.optimizer.optim.adamw.lr={rate}",
            "v1.2.train.trainable.0.adapters.lora.rank=2",
            "steps.1.train.objective.objectives.sft.cross_entropy.per=example",
            "evaluation.dial.budget=2.0",
            "precision.compute=bf16",
            "sft.train.stop.reach=0.5",
            "steps.v1.2.train.batch=3",
            "sft.train.optimizer.optim.adamw.weight_decay=1e-2",
            "v1.2.train.regularizers.regularizers.kl.weight=0.5",
        ],
    )
    a, b = got.steps[0].train, got.steps[1].train
    assert (
        got.seed == 7 and a.steps == 50 and a.optimizer.lr == rate and a.optimizer.weight_decay == 0.01 and a.stop.reach == 0.5
    )
    assert b.trainable[0].rank == 2 and b.objective.per == "example" and b.batch == 3 and b.regularizers[0].weight == 0.5
    assert got.evaluation.dial.budget == 2.0 and got.precision.compute == "bf16"
    assert read(base, ["sft.train.clip="]).steps[0].train.clip is None
    assert read(base, ["sft.train.source={data.lab: {skills: [copy, sort]}}"]).steps[0].train.source.skills == ["copy", "sort"]


@pytest.mark.parametrize(
    "override, why",
    [
        ("seed", "write key=value"),
        ("=3", "write key=value"),
        ("a..b=3", "write key=value"),
        ("sft.train.stepz=3", "did you mean 'steps'"),
        ("steps.7.train.steps=3", "has 2 entries and none is '7'"),
        ("steps.²=3", "none is '²'"),
        ("steps.-1.train.steps=3", "none is '-1'"),
        ("sft=3", "whole step"),
        ("seed.x=3", "'seed' is 1, not a mapping"),
        ("base.x=1", "lab/lm"),
        ("sft.train.steps=[", "no plain YAML"),
        ("sft.train.steps=x", "steps is 'x'"),
        ("steps.0=3", "steps[0]"),
        ("steps=3", "steps is 3"),
        ("other.train.steps=3", "no such key"),
        ("seed=*a", "no plain YAML"),
    ],
    ids=str,
)
def test_an_override_that_cannot_be(override, why):
    assert why in refused(recipe(train("sft"), train("b"), seed=1), override)


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["train", "steps", "optim.adamw", "base", "measure"]),
    lambda x: (
        st.lists(x, max_size=3)
        | st.dictionaries(
            st.text(max_size=4) | st.sampled_from(["name", "train", "rounds", "steps", "foreach", "values", "source"]),
            x,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_recipe_of_any_types_is_a_sentence(data):
    document = copy.deepcopy(RICH)
    here = document
    for _ in range(data.draw(st.integers(1, 5))):  # walk somewhere and put something there
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(here[key], (dict, list)) or not here[key] or data.draw(st.integers(0, 3)) == 0:
            here[key] = data.draw(ANY)
            break
        here = here[key]
    try:
        one = read(document)
    except UserError as problem:
        assert str(problem).endswith((".", "?"))
    else:
        assert read(yaml.safe_load(one.yaml())) == one


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="steps.train0sftoptim=-1e[]{}:*& ", max_size=30), st.booleans())
def test_an_override_of_any_text_is_a_sentence(text, prefix):
    try:
        read(RICH, [("a.train." if prefix else "") + text])
    except UserError as problem:
        assert "\n" not in str(problem)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"epochs": float("inf")}, "epochs must be finite"),
        ({"steps": 2, "players": {"c": {"objective": {"Tokens": "objectives.sft.cross_entropy"}, "every": 0}}}, "every must"),
    ],
)
def test_numbers_no_loop_can_take_are_refused(train, said):
    source = {"data.file": {"path": "x.jsonl"}}
    with pytest.raises(UserError, match=said):
        read({"base": "lab/lm", "steps": [{"train": {"source": source, **train}}]})
    with pytest.raises(UserError, match="limit must be at least 1"):
        read({"base": "lab/lm", "steps": [{"build": {"builder": {"data.self_play": {"rows": source}}, "limit": 0}}]})


def test_a_round_cannot_begin_with_its_own_end():
    step = {"name": "a", "measure": True, "start": "r"}
    with pytest.raises(UserError, match="not a step before this one"):
        read({"base": "lab/lm", "steps": [{"name": "r", "rounds": {"times": 2, "steps": [step]}}]})
