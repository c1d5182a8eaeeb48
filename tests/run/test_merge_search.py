"""A search that was stopped is the search that was not; the dial takes up what it measured and mixes nothing up."""

import json
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

from temperament import api
from temperament.delta import Delta, Dense
from temperament.errors import UserError
from temperament.report import picture
from temperament.run import dial, merge_search

METHOD = {
    "merge.task_arithmetic": {"scale": {"search": [0, 2]}, "weights": [{"search": [0, 1]}, {"search": {"choices": [1, 2]}}]}
}


@pytest.fixture
def world(monkeypatch):
    """Two changes of one number; a merge gains the more the nearer it comes to 1, and loses what it passes beyond. `made`: what
    was merged in the end."""
    made = []

    class Base(dict):
        id, sha256, reading = "lab/none", {"lm": "0"}, "r"

    def summary(delta):
        at = float(delta.change("lm/w").delta())
        return {"target": 0.0, "retained": 0.0, "target_change": 10 - 10 * abs(at - 1), "retained_change": min(0.0, 1 - at)}

    def merge(models, out, **how):
        made.append(how["method"])
        out.mkdir()
        return {"out": str(out)}

    deltas = {name: Delta({"lm/w": Dense(torch.tensor([value]))}) for name, value in (("a", 0.5), ("b", 0.7))}
    monkeypatch.setattr(merge_search, "load", lambda *a, **k: Base({"w": torch.zeros(1)}))
    monkeypatch.setattr(merge_search, "delta_of", lambda name, base: deltas[name])
    monkeypatch.setattr(merge_search, "Scorer", lambda *a: SimpleNamespace(summary=summary))
    monkeypatch.setattr(merge_search, "merge", merge)
    return made


def search(out, trials, seed=0):
    suites = [{"evaluate.lab": {"target": "shift"}}]
    return merge_search.search(["a", "b"], out, method=METHOD, suites=suites, base="x", trials=trials, seed=seed)["search"]


def test_a_search_stopped_again_and_again_is_the_same(world, tmp_path, monkeypatch):
    whole = search(tmp_path / "whole", 14)  # more than are drawn at random before the sampler models
    for trials in (2, 3, 11):
        search(tmp_path / "parts", trials)
        (tmp_path / "parts").rmdir()
    score = merge_search.Scorer().summary

    def killed(delta):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_search, "Scorer", lambda *a: SimpleNamespace(summary=killed))
    with pytest.raises(KeyboardInterrupt):  # in the midst of a trial
        search(tmp_path / "parts", 14)
    monkeypatch.setattr(merge_search, "Scorer", lambda *a: SimpleNamespace(summary=score))
    again = search(tmp_path / "parts", 14)
    assert again["trials"] == whole["trials"] and again["best"] == whole["best"] and world[-1] == world[0]
    methods = [json.dumps(r["method"]) for r in whole["trials"]]
    assert len(set(methods)) == 14, "no trial repeats another"
    assert search(tmp_path / "seeded", 2, seed=1)["trials"][0] != whole["trials"][0]


def test_what_cannot_be_searched_is_said_before_the_first_trial(world, tmp_path):
    for trials in (-2, 0):
        with pytest.raises(UserError, match="1 or more"):
            search(tmp_path / "out", trials)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="not empty"):
        search(tmp_path / "out", 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"] and not world


def test_ticks_of_equal_trials_are_different_numbers():
    row = {"target_change": 0.0, "retained_change": 0.0}
    drawn = ElementTree.fromstring(picture.search_picture({"trials": [row] * 3, "best": row, "budget": 0.5}))
    said = [e.text for e in drawn.iter() if "tick end" in e.get("class", "")]
    assert len(said) > 2 and len(set(said)) == len(said) and "-0" not in said


# ---- the dial --------------------------------------------------------------------------------------------------------


class Sweep:
    """Skills of a base whose one number is `at`; counts what is measured."""

    def __init__(self, key="k", stop=99):
        self.at, self.count, self.named, self.stop = 0.0, 0, key, stop
        made = [self.skill("new", "target", lambda x: x), self.skill("old", "retained", lambda x: 1 - x * x / 8)]
        self.skills, self.sha256, self.reading, self.places, self.base = made, {"lm": "0"}, "r", None, self

    def skill(self, name, role, of):
        def measure(system):
            self.count += name == "new"
            if self.count > self.stop:
                raise KeyboardInterrupt
            return [SimpleNamespace(score=of(self.at), extra={}, prompt="")]

        made = SimpleNamespace(name=name, role=role, how={}, measure=measure)
        made.some = lambda n: made
        return made

    def key(self, of):
        return self.named + of

    def system(self, graded):
        return None

    def reset(self):
        self.at = 0.0

    def apply(self, delta):
        self.at = float(delta.change("lm/w").delta())


def spec(*strengths, items=4):
    return SimpleNamespace(strengths=list(strengths), shape=["merge.linear"], budget=5.0, items=items)


def test_a_dial_goes_on_where_it_was(tmp_path):
    delta, file = Delta({"lm/w": Dense(torch.ones(1))}), tmp_path / "dial.json"
    sweep = lambda skills, *strengths, change=delta, **how: dial.dial(skills, change, spec(*strengths, **how), keep=file)
    whole = dial.dial(Sweep(), delta, spec(0, 0.25, 0.5, 1))
    first = Sweep(stop=2)
    with pytest.raises(KeyboardInterrupt):
        sweep(first, 0, 0.25, 0.5, 1)
    assert len(json.loads(file.read_text())["points"]) == 2
    second = Sweep()
    assert sweep(second, 0, 0.25, 0.5, 1) == whole and second.count == 2, "the base and the first point were there"
    third = Sweep()
    assert [p["strength"] for p in sweep(third, 0.75, 1)["points"]] == [0.75, 1] and third.count == 1
    assert len(json.loads(file.read_text())["points"]) == 5
    # other skills, another change, fewer items: nothing is taken up
    for other, how in ((Sweep("other"), {}), (Sweep(), {"change": delta * 0.5}), (Sweep(), {"items": 2})):
        sweep(other, 0, 1, **how)
        assert other.count == 2 and len(json.loads(file.read_text())["points"]) == 2
    file.write_text("[]")
    assert sweep(Sweep(), 0, 1)["points"][1]["target"] == 1


def test_the_verb_keeps_and_draws_the_dial(tmp_path, monkeypatch):
    from temperament.run import reopen

    made = Sweep()
    again = SimpleNamespace(recipe=SimpleNamespace(evaluation=SimpleNamespace(dial=None)), skills=lambda: made, base=made)
    again.delta = Delta({"lm/w": Dense(torch.ones(1))})
    monkeypatch.setattr(reopen, "reopen", lambda run, device: again)
    found = api.dial(tmp_path, strengths=[0, 0.5, 1], budget=5.0, out=tmp_path / "kept")
    assert found["picture"] == str(tmp_path / "kept/dial.svg") and found["best"]["strength"] == 0.5
    drawn = ElementTree.parse(tmp_path / "kept/dial.svg").getroot()
    assert any("target" in (e.text or "") for e in drawn.iter()) and len([e for e in drawn.iter() if "polyline" in e.tag]) >= 2
    counted = made.count
    assert api.dial(tmp_path, strengths=[0, 0.5, 1], budget=5.0, out=tmp_path / "kept") == found and made.count == counted
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        api.dial(tmp_path, strengths=[0, 1], out=tmp_path / "file")
