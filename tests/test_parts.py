"""The registry: found without torch, refused in a sentence, built strictly, open to others."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temperament import parts, protocols
from temperament.errors import UserError
from temperament.parts import build, coerce, fill, part, plain
from temperament.protocols import Progress

SRC = str(Path(parts.__file__).parents[1])


def python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": SRC, **env},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def refused(value: Any, slot: Any = None, field: str = "step") -> str:
    with pytest.raises(UserError) as problem:
        build(value, slot, field)
    assert "\n" not in str(problem.value) and len(str(problem.value)) < 600
    return str(problem.value)


# ---- finding ---------------------------------------------------------------------------------------------------------------


def test_the_index_is_read_without_importing_anything_heavy():
    out = python("""
        import sys, time
        t = time.perf_counter()
        import temperament
        from temperament import parts
        names, brief = parts.names(), parts.brief()
        print(len(names), all(brief[n]["summary"] for n in names))
        print([m for m in ("torch", "transformers", "numpy", "pydantic", "yaml") if m in sys.modules])
        print(any(m.startswith("temperament.methods") for m in sys.modules), time.perf_counter() - t)
    """)
    count, told, heavy, imported, seconds = out.replace("\n", " ").replace("[]", "none").split()
    assert (
        int(count) == len(parts.names()) > 25
        and told == "True"
        and heavy == "none"
        and imported == "False"
        and float(seconds) < 5
    )


def test_every_part_of_the_index_is_what_it_says():
    for name, where in parts.index().items():
        cls = parts.get(name)
        assert cls.part_name == name and f"{cls.__module__}:{cls.__name__}" == where
        assert (
            parts.brief()[name]["summary"] == parts.card(name).summary
            and tuple(parts.brief()[name]["papers"]) == parts.card(name).papers
        )
    assert parts.names("objectives") == [n for n in parts.names() if n.startswith("objectives.")]


def test_a_name_that_is_none():
    assert "no such part; did you mean 'objectives.preference.dpo'" in refused("objectives.preference.dpoo")
    assert "'adapters.lora'" in refused("lora") and "'adapters.lora'" in refused("select.lora")
    assert "known: " in refused("zzzzzz")


def test_a_part_of_another_room():
    said = refused("adapters.lora", protocols.Objective, "train.objective")
    assert said.startswith("train.objective is 'adapters.lora': this place takes a part of objectives")
    assert "merge.linear" in refused("merge.liner", protocols.Merge)
    assert "it has no" in refused({"data.lab": {"skills": ["add"]}}, protocols.Builder)  # the room fits, the part does not


def test_declaring_a_part():
    @dataclass
    class Soft:
        """Not frozen."""

    with pytest.raises(TypeError, match="frozen"):
        part("select.soft")(Soft)

    @dataclass(frozen=True)
    class Silent:
        x: int = 1

    with pytest.raises(TypeError, match="docstring"):
        part("select.silent")(Silent)


# ---- building --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, why", [
    ({"adapters.lora": {"rnak": 4}}, "adapters.lora.rnak is 4: no such key; did you mean 'rank'"),
    ({"adapters.lora": {"rank": "4"}}, "adapters.lora.rank is '4'"),
    ({"adapters.lora": {"rank": 4.5}}, "adapters.lora.rank is 4.5"),
    ({"adapters.lora": {"rank": True}}, "adapters.lora.rank is True"),
    ({"adapters.lora": {"rank": None}}, "adapters.lora.rank is None"),
    ({"adapters.lora": {"rank": 0}}, "rank must be at least 1"),
    ({"adapters.lora": {"dropout": True}}, "adapters.lora.dropout is True"),
    ({"adapters.lora": {"dropout": float("nan")}}, "nan"),
    ({"adapters.lora": {"targets": [1]}}, "adapters.lora.targets[0] is 1"),
    ({"adapters.lora": {"targets": {"a": 1}}}, "targets"),
    ({"adapters.lora": [1]}, "give a mapping of options"),
    ({"adapters.lora": {1: 2}}, "no such key"),
    ({"schedules.cosine": {}}, "schedules.cosine.peak is None: required: value after the warm-up"),
    ({"select.half": {"by": "heads"}}, "select.half.by is 'heads'"),
    ({"select.half": {"share": 1.5}}, "share lies in (0, 1]"),
    ({"adapters.lora": {}, "select.full": {}}, "write a part as its name"),
    ({}, "write a part as its name"), (None, "write a part as its name"), (3, "write a part as its name"), ([], "write a part"),
    ({3: {}}, "write a part as its name"),
], ids=str)  # fmt: skip
def test_wrong_options_are_named(value, why):
    assert why in refused(value)


def test_a_schedule_where_a_number_is_read_once_is_refused():
    ramp = {"schedules.linear": {"start": 0.1, "end": 0.5}}
    dpo = build({"objectives.preference.dpo": {"beta": ramp}}, protocols.Objective)
    assert parts.at(dpo, Progress(0, 3)).beta == pytest.approx(0.1) and parts.at(dpo, Progress(2, 3)).beta == pytest.approx(0.5)
    assert "schedule" in refused({"adapters.lora": {"dropout": ramp}}, protocols.Trainable)
    assert "schedule" in refused({"merge.linear": {"scale": ramp}}, protocols.Merge)
    for option in ("weight_decay", "eps"):  # read when the optimizer is built; only the rate is set anew
        assert "schedule" in refused({"optim.adamw": {option: ramp}}, protocols.Optimizer)
    assert build({"optim.adamw": {"lr": ramp}}, protocols.Optimizer).lr.end == 0.5
    assert "schedule" in refused({"data.file": {"path": "x", "holdout": ramp}}, protocols.Source)
    sample = {"prompts": {"data.lab": {"skills": ["add"]}}, "rewards": "rewards.lab"}
    assert build({"rollout.sample": {**sample, "temperature": ramp}}, protocols.Source).temperature.end == 0.5
    assert "schedule" in refused({"schedules.constant": {"value": ramp}})
    assert "objectives" in refused({"objectives.preference.dpo": {"beta": "adapters.lora"}}, protocols.Objective)


def test_what_a_schedule_comes_to_is_checked_before_training():
    dpo = lambda **options: {"objectives.preference.dpo": options}
    line = lambda start, end, **more: {"schedules.linear": {"start": start, "end": end, **more}}
    said = refused(dpo(beta=line(0.1, -1.0)), protocols.Objective)
    assert said.startswith("step.objectives.preference.dpo.beta is -0.") and "above 0; its schedule comes to" in said
    assert "label_smoothing is 0.7" in refused(dpo(label_smoothing=line(0.0, 0.7, begin=0.99)), protocols.Objective)
    assert "beta is 0.0:" in refused(dpo(beta=line(0.0, 1.0)), protocols.Objective)
    cosine = {"schedules.cosine": {"peak": 1.0, "end": -0.1, "warmup": 500}}
    assert "beta is -" in refused(dpo(beta=cosine), protocols.Objective)
    rounds = {"schedules.steps": {"values": [0.1, 0.2, 0.0], "by": "round"}}
    assert "beta is 0.0:" in refused(dpo(beta=rounds, label_smoothing=line(0.0, 0.1)), protocols.Objective)
    both = dpo(beta=line(0.1, 2.0, warmup=9), label_smoothing=line(0.4, 0.0))
    assert build(both, protocols.Objective).beta.end == 2.0


def test_slots_hold_parts_that_hold_parts():
    spec = {"merge.lines": {"of": {"merge.lines": {"alpha": 0.5, "of": "merge.linear"}}}}
    made = build(spec, protocols.Merge)
    assert made.of.of == build("merge.linear") and [type(p).part_name for p in parts.walk(made)] == [
        "merge.lines",
        "merge.lines",
        "merge.linear",
    ]
    assert "merge.lines.of" in refused({"merge.lines": {"of": "adapters.lora"}})
    assert "of.merge.linear.scael" in refused({"merge.lines": {"of": {"merge.linear": {"scael": 2}}}})
    sample = {"prompts": {"data.lab": {"skills": ["add"]}}, "rewards": "rewards.lab"}  # one part where several may stand
    assert build({"rollout.sample": sample}).rewards == [build("rewards.lab")]
    assert "rewards[1]" in refused({"rollout.sample": {**sample, "rewards": ["rewards.lab", "merge.linear"]}})


def test_plain_types():
    assert coerce([1, 2], list[float], "x") == [1.0, 2.0] and coerce([0.9, 0.99], tuple[float, float], "x") == (0.9, 0.99)
    assert coerce(None, int | None, "x") is None and coerce("a", Literal["a", "b"], "x") == "a" and coerce(3, float, "x") == 3.0
    for bad, hint in [
        ([1], tuple[float, float]),
        ("1", int),
        (1.5, int),
        ("x", Literal["a"]),
        ({"a": "b"}, dict[str, int]),
        ("abc", list[str]),
    ]:
        with pytest.raises(UserError, match="x"):
            coerce(bad, hint, "x")


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(parts.names()),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.sampled_from(parts.names()), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=250, deadline=None)
@given(
    ANY,
    st.sampled_from([None, protocols.Trainable, protocols.Objective, protocols.Source, protocols.Merge, protocols.Optimizer]),
)
def test_anything_else_is_a_sentence(value, slot):
    try:
        made = build(value, slot)
    except UserError as problem:
        assert "\n" not in str(problem).replace(repr(value), "") and str(problem).endswith((".", "?"))
    else:
        assert build(plain(made), slot) == made


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_options_of_any_kind_are_a_part_or_a_sentence(data):
    name = data.draw(st.sampled_from(parts.names()))
    options = data.draw(st.dictionaries(st.sampled_from([*parts.card(name).options, "x"]), ANY, max_size=3))
    try:
        made = build({name: options})
    except UserError:
        return
    assert build(plain(made)) == made


@pytest.mark.parametrize("name", parts.names())
def test_types_on_cards_are_readable(name):
    for option in parts.card(name).options.values():
        assert option["type"] and "temperament." not in option["type"] and "<" not in option["type"], option


def test_a_schedule_is_read_wherever_it_stands():
    """In an option, a list, or a mapping; what holds none is the same object."""
    ramp = {"schedules.linear": {"start": 0.1, "end": 0.5}}
    dpo = build({"objectives.preference.dpo": {"beta": ramp}}, protocols.Objective)
    held = {"Pairs": dpo, "rest": [{"deep": dpo}], "plain": 3}
    now = parts.at(held, Progress(2, 3))
    assert now["Pairs"].beta == now["rest"][0]["deep"].beta == pytest.approx(0.5) and now["plain"] == 3
    assert parts.at(now, Progress(0, 3)) is now


def test_fill_refuses_what_is_no_mapping():
    @dataclass(frozen=True)
    class Two:
        a: int
        b: float = 0.5

    assert fill(Two, {"a": 1}, "two") == Two(1)
    for bad in (None, 3, "a", [1]):
        with pytest.raises(UserError, match=r"give a mapping of options \(a, b\)"):
            fill(Two, bad, "two")


# ---- parts of others ---------------------------------------------------------------------------------------------------------

THEIRS = '''
"""A third party's part."""
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
from temperament.nn.batch import Tokens
from temperament.nn.logprobs import label, score
from temperament.parts import part
from temperament.protocols import Term, Terms


@part("objectives.sft.half_nll", papers=["243"])
@dataclass(frozen=True)
class HalfNLL:
    """Half of the negative log-likelihood: loss = - f * sum log p / count."""

    batch: ClassVar = ("Tokens",)
    factor: float = 0.5  # f

    def counts(self, whole: Tokens) -> dict[str, float]:
        return {"half": whole.trained}

    def loss(self, micro: Tokens, views) -> Terms:
        return {"half": Term(-score(views.model, micro, label())["label"] * micro.weights, micro.trained, self.factor)}
'''


@pytest.fixture
def elsewhere(tmp_path):
    """A package installed by hand: a module and its dist-info with the entry point."""
    (tmp_path / "theirs.py").write_text(THEIRS)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[temperament.parts]\nobjectives.sft.half_nll = theirs:HalfNLL\n")
    return tmp_path


def test_a_part_of_another_package_runs_from_a_recipe(elsewhere):
    recipe = {
        "base": "lab/lm",
        "check": False,
        "evaluation": {
            "keep": False,
            "base": False,
            "suites": [{"evaluate.lab": {"target": "shift", "retained": ["copy"], "items": 2}}],
        },
        "steps": [
            {
                "name": "a",
                "ledger": False,
                "train": {
                    "source": {"data.lab": {"skills": ["shift"], "rows": 8}},
                    "steps": 2,
                    "batch": 4,
                    "objective": {"objectives.sft.half_nll": {"factor": 0.25}},
                    "trainable": {"adapters.lora": {"rank": 2}},
                },
            }
        ],
    }
    out = python(f"""
        import json, sys
        from temperament import parts
        assert "theirs" not in sys.modules and "objectives.sft.half_nll" in parts.names("objectives")
        assert parts.brief()["objectives.sft.half_nll"]["papers"] == ["243"]
        card = parts.card("objectives.sft.half_nll")
        assert card.options["factor"] == {{"type": "float", "default": 0.5, "help": "f"}}, card.options
        from temperament.run.tune import tune
        run = tune(json.loads({json.dumps(json.dumps(recipe))}), {str(elsewhere / "out")!r})
        rows = [json.loads(l) for l in open({str(elsewhere / "out" / "log.jsonl")!r})]
        print(run.json["status"], abs(rows[0]["loss"] - 0.25 * rows[0]["terms"]["half"]) < 1e-6, len(rows))
    """, PYTHONPATH=os.pathsep.join([SRC, str(elsewhere)]), TEMPERAMENT_CACHE=str(elsewhere / "cache"))  # fmt: skip
    assert out.strip().split("\n")[-1] == "done True 2"


def test_a_package_cannot_take_a_name_of_ours_or_lie_about_its_own(elsewhere):
    points = elsewhere / "theirs-1.0.dist-info" / "entry_points.txt"
    path = os.pathsep.join([SRC, str(elsewhere)])
    code = """
        from temperament import parts
        from temperament.errors import UserError
        try:
            parts.get("objectives.sft.other")
        except UserError as problem:
            print(problem)
    """
    points.write_text("[temperament.parts]\nadapters.lora = theirs:HalfNLL\n")
    assert "already a part of temperament" in python(code, PYTHONPATH=path)
    points.write_text("[temperament.parts]\nobjectives.sft.other = theirs:HalfNLL\n")
    assert "does not register it" in python(code, PYTHONPATH=path)
    points.write_text("[temperament.parts]\nobjectives.sft.other = theirs_not_there:X\n")
    assert "could not be loaded" in python(code, PYTHONPATH=path)
