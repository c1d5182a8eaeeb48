"""What must not be taken from a cache: scores and steps of a base that is used otherwise than it was."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from run.test_tune import cached, light, recipe, train  # noqa: F401 - the fixture
from tiny import write_rows

from temperament.bases.kept import kept
from temperament.bases.load import load
from temperament.run.artefacts import address, file_sha
from temperament.run.recipe import read
from temperament.run.skills import Skills
from temperament.run.steps import Steps
from temperament.run.tune import tune


@pytest.fixture
def folder(tmp_path):
    base = load("lab/lm-small")
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def carried_out(document, out) -> tuple[bool, bool]:
    """(were the base's scores, was the step taken from a cache?)"""
    seen = {}
    tell = lambda event, **data: seen.update({data["row"]: data["cached"]}) if event == "measured" else None
    run = tune(document, out, tell=tell)
    return seen["base"], cached(run)["sft"]


def edited(file: Path, change) -> None:
    text = file.read_text()
    file.write_text(change(text))
    assert file.read_text() != text


def test_a_base_read_otherwise_is_measured_and_tuned_anew(folder, tmp_path):
    said = lambda i: [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}]
    data = {"path": write_rows(tmp_path / "rows.jsonl", [{"messages": said(i)} for i in range(12)]), "holdout": 2}
    document = recipe(train("sft", steps=1, source={"data.file": data}), suites=[]) | {"base": str(folder)}
    out = tmp_path / "run"
    assert carried_out(document, out) == (False, False)
    assert carried_out(document, out) == (True, True)
    assert carried_out(document | {"base": f"{folder}/"}, out) == (True, True)

    assert carried_out(document | {"precision": {"master": "bf16"}}, out) == (False, False)
    edited(folder / "chat_template.jinja", lambda t: t.replace("<|end|>{% endif", " <|end|>{% endif"))
    assert carried_out(document, out) == (False, False)
    norm = lambda t: json.dumps(json.loads(t) | {"rms_norm_eps": 0.01})
    edited(folder / "config.json", norm)
    assert carried_out(document, out) == (False, False)

    own = tmp_path / "own.jinja"
    own.write_text((folder / "chat_template.jinja").read_text())
    data["chat_template"] = str(own)
    assert carried_out(document, out) == (False, False)
    edited(own, lambda t: t.replace("<|end|>{% endif", "! <|end|>{% endif"))
    assert carried_out(document, out) == (False, False)
    assert carried_out(document, out) == (True, True)


def test_scores_and_rows_are_of_the_files_that_answering_reads(tmp_path):
    """An inference part may read a file: other content under the same name is another system."""
    file = tmp_path / "words.txt"
    file.write_text("one")
    given = replace(read(recipe(train("sft", steps=1))), inference=[Reads(str(file))])
    skills = Skills([], given, None)
    steps = object.__new__(Steps)
    steps.recipe, steps.states, steps.latest = given, {}, {}
    build = SimpleNamespace(name="rows", merge=None, build=True, train=None)
    before = skills.key("x"), address(steps.inputs(build, None))
    assert (skills.key("x"), address(steps.inputs(build, None))) == before
    file.write_text("two")
    assert skills.key("x") != before[0] and address(steps.inputs(build, None)) != before[1]


@dataclass(frozen=True)
class Reads:
    path: str
    part_name = "decode.reads"

    def fingerprint(self):
        return file_sha(self.path)


def test_a_run_that_changed_nothing_is_its_base_whatever_lay_in_the_folder(tmp_path):
    out = tmp_path / "run"
    tune(recipe(train("sft", steps=1)), out)
    assert kept(out).delta is not None
    tune(recipe({"name": "look", "measure": True}), out)
    assert kept(out).delta is None
