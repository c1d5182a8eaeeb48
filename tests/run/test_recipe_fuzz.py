"""Whatever a recipe holds: it reads back to itself, or is refused in one sentence; never anything else."""

import copy
import os

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from temperament import parts
from temperament.errors import UserError
from temperament.run import recipe as schema
from temperament.run.new import KINDS, write

VALID = {kind: yaml.safe_load(write(kind, base="lab/lm", data="new.jsonl")) for kind in KINDS}
VALID["rich"] = {
    "base": "lab/lm",
    "steps": [
        {
            "name": "a",
            "train": {
                "source": {"data.file": {"path": "a.jsonl"}},
                "steps": 3,
                "stop": {"reach": 0.5},
                "regularizers": ["regularizers.kl"],
            },
        },
        {"name": "m", "merge": {"method": {"merge.linear": {"weights": [0.5]}}, "of": ["a"]}},
        {
            "rounds": {
                "times": 2,
                "steps": [{"train": {"source": {"data.file": {"path": "b"}}, "epochs": 0.5}}],
                "until": {"above": 0.9},
            }
        },
        {
            "foreach": {
                "values": {"p": ["x", "y"]},
                "steps": [{"train": {"source": {"data.file": {"path": "{p}"}}, "steps": 1}}],
            }
        },
        {"when": {"skill": "add", "below": 0.5}, "measure": True},
    ],
    "inference": [{"decode.repetition_penalty": {"penalty": 1.1}}],
    "evaluation": {"suites": [{"evaluate.file": {"data": {"data.file": {"path": "t.jsonl"}}}}], "dial": {}},
}

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=12),
    st.binary(max_size=4),
    st.dates(),
    st.sampled_from(
        [
            "",
            "previous",
            "base",
            "lab/lm",
            "select.full",
            "adapters.lora",
            "merge.linear",
            "schedules.cosine",
            "data.file",
            "../..",
            "a/b",
            "\x00",
            "1e400",
            "{p}",
            "{}",
        ]
    ),
)
KEYS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            "base",
            "steps",
            "train",
            "name",
            "source",
            "schedules.cosine",
            "adapters.lora",
            "select.full",
            "data.file",
            "peak",
            "lr",
            "rank",
        ]
    ),
    st.integers(),
    st.none(),
)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)), max_leaves=12
)
QUIET = settings(
    max_examples=int(os.environ.get("FUZZ", "80")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def reads(document, overrides=()):
    """The recipe, or None where it was refused in one sentence."""
    try:
        recipe = schema.read(document, overrides)
    except UserError as problem:
        sentence = str(problem)
        assert problem.field and problem.mend and "\n" not in sentence and len(sentence) < 2000, sentence
        return None
    again = schema.read(yaml.safe_load(recipe.yaml()))
    assert again.plain() == recipe.plain()
    return recipe


def places(value, here=()):
    """Every path in a document."""
    yield here
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in children:
        yield from places(inner, (*here, key))


def put(document, path, value):
    if not path:
        return value
    document = copy.deepcopy(document)
    here = document
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    return document


@pytest.mark.parametrize("kind", VALID)
def test_the_valid_ones_are(kind):
    assert reads(VALID[kind]) is not None


@QUIET
@given(document=st.dictionaries(KEYS, ANYTHING, max_size=5))
def test_random_documents(document):
    reads(document)


@QUIET
@given(data=st.data())
def test_anything_at_any_place_of_a_valid_recipe(data):
    document = VALID[data.draw(st.sampled_from(sorted(VALID)))]
    path = data.draw(st.sampled_from(list(places(document))[1:]))
    reads(put(document, path, data.draw(ANYTHING)))


@QUIET
@given(data=st.data())
def test_further_keys_and_missing_ones(data):
    document = VALID[data.draw(st.sampled_from(sorted(VALID)))]
    inner = [p for p in places(document) if isinstance(at(document, p), dict)]
    path = data.draw(st.sampled_from(inner))
    old = at(document, path)
    if data.draw(st.booleans()) and old:
        new = {k: v for k, v in old.items() if k != data.draw(st.sampled_from(sorted(old)))}
    else:
        new = old | {data.draw(KEYS): data.draw(ANYTHING)}
    reads(put(document, path, new))


def at(document, path):
    for key in path:
        document = document[key]
    return document


@QUIET
@given(name=st.sampled_from(sorted(parts.index())), options=st.one_of(ANYTHING, st.dictionaries(KEYS, ANYTHING, max_size=3)))
def test_any_part_with_any_options(name, options):
    try:
        built = parts.build({name: options})
    except UserError as problem:
        assert "\n" not in str(problem)
        return
    assert parts.plain(parts.build(parts.plain(built))) == parts.plain(built)


@QUIET
@given(name=st.sampled_from(sorted(parts.index())), data=st.data())
def test_any_option_of_any_part_with_any_value(name, data):
    known = parts.card(name).options
    if not known:
        return
    options = data.draw(st.dictionaries(st.sampled_from(sorted(known)), ANYTHING, max_size=3))
    try:
        built = parts.build({name: options})
    except UserError as problem:
        assert "\n" not in str(problem)
        return
    assert parts.plain(parts.build(parts.plain(built))) == parts.plain(built)


@QUIET
@given(
    path=st.lists(
        st.one_of(
            st.sampled_from(
                [
                    "steps",
                    "0",
                    "1",
                    "9",
                    "-1",
                    "train",
                    "sft",
                    "lr",
                    "optimizer",
                    "optim",
                    "adamw",
                    "",
                    "base",
                    "evaluation",
                    "dial",
                ]
            ),
            st.text(max_size=5),
        ),
        max_size=6,
    ),
    text=st.one_of(
        st.text(max_size=20),
        st.sampled_from(["1", "[1, 2]", "{a: 1}", "*x", "&x 1", "!!python/object:os.system", "", "1e-4", "null"]),
    ),
)
def test_any_override(path, text):
    reads(VALID["sft"], [".".join(path) + "=" + text])


@QUIET
@given(text=st.one_of(st.text(max_size=200), st.binary(max_size=200)))
def test_any_file(text, tmp_path_factory):
    file = tmp_path_factory.mktemp("fuzz") / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        schema.read(file)
    except UserError as problem:
        assert "\n" not in str(problem)


def test_a_bomb_a_tag_and_a_giant(tmp_path):
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for name, text in {
        "bomb": bomb,
        "tag": "base: !!python/object/apply:os.system ['true']\n",
        "deep": "[" * 5000,
        "merge": "a: {b: 1}\n<<: {base: x}\n",
        "twice": "base: a\nbase: b\n",
        "list": "- a\n",
        "empty": "",
        "null": "null\n",
        "big": "base: " + "x" * (2 << 20),
        "date": "base: 2001-01-01\n",
        "infinite": "base: lab/lm\nseed: .inf\n",
        "octal": "base: 0777\n",
        "two": "base: a\n---\nbase: b\n",
        "set": "base: !!set {a}\n",
        "listkey": "? [a, b]\n: c\n",
        "mapkey": "{{a: b}: c}\n",
        "binary": "base: !!binary aGk=\n",
    }.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(text)
        try:
            schema.read(file)
        except UserError as problem:
            assert "\n" not in str(problem) and len(str(problem)) < 600


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "a b", "x" * 65, "-x", "ä", "a\n"])
def test_step_names_stay_in_their_folder(name):
    document = put(VALID["rich"], ("steps", 0, "name"), name)
    recipe = reads(put(document, ("steps", 1, "merge", "of"), []))
    assert recipe is None or name == "" or recipe.steps[0].name not in (".", "..")
    if any(c in name for c in "/ \n") or name in (".", "..", "-x") or len(name) > 64:
        assert recipe is None
