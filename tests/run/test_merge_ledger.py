"""The ledger of a merge: a row each, told by name while it is measured, and kept beside what was merged."""

import json
from types import SimpleNamespace

import pytest

from temperament import cli
from temperament.protocols import Outcome
from temperament.run import merge_ledger
from temperament.run.outcome import SkillResult


def test_rows_are_told_by_name_and_kept(tmp_path, monkeypatch):
    scores = {"lab/none": [0, 0], "runs/a": [1, 0], "runs/b": [0, 1], str(tmp_path): [1, 1]}
    monkeypatch.setattr(merge_ledger, "subject", lambda place: SimpleNamespace(id=place, reset=lambda: None))
    monkeypatch.setattr(merge_ledger, "skills_of", lambda recipe, model: model.id)

    def measured(skills, model, tell, row):
        tell("measure", skill="new", done=0, total=1)
        outcomes = tuple(Outcome(str(i), "new", score=float(s)) for i, s in enumerate(scores[skills]))
        return {"new": SkillResult("new", "target", "exact", outcomes)}

    monkeypatch.setattr(merge_ledger, "measured", measured)
    told = []
    found = merge_ledger.ledger(
        ["runs/a", "runs/b"], tmp_path, suites=[], base="lab/none", tell=lambda event, **data: told.append((event, data))
    )
    said = [data["text"] for event, data in told if event == "note"]
    assert said == ["base, 1 of 4: lab/none", "a, 2 of 4: runs/a", "b, 3 of 4: runs/b", f"merge, 4 of 4: {tmp_path}"]
    order = [event for event, _ in told if event in ("note", "measure")]
    assert order == ["note", "measure"] * 4, "each is named before it is measured"
    kept = json.loads((tmp_path / "ledger.json").read_text())
    assert kept["ledger"] == json.loads(json.dumps(found["ledger"])) and kept["synergy"]["new"]["synergy"] == 0.5
    assert kept["rows"] == {"base": "lab/none", "a": "runs/a", "b": "runs/b", "merge": str(tmp_path)}
    assert kept["ledger"]["matrix"]["values"] == [[0.0], [0.5], [0.5], [1.0]]


@pytest.mark.parametrize("suite", ["nix", "{evaluate.lab: {goal: shift}}"])
def test_a_wrong_suite_is_told_before_anything_is_written(tmp_path, monkeypatch, capsys, suite):
    from temperament import api

    monkeypatch.setattr(api, "merge", lambda *a, **k: pytest.fail("merged already"))
    assert cli.main(["merge", "runs/a", "runs/b", "--out", str(tmp_path / "out"), "--suite", suite]) == 2
    assert "--suite" in capsys.readouterr().err and not (tmp_path / "out").exists()
