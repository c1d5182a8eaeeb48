"""One budget, two kinds of rows: what is planned conserves it, the ends are the plain methods, and what was run is read from
what is there."""

import json
import random
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_rows

from temperament import api, parts
from temperament.errors import UserError
from temperament.methods.studies.budget import Budget, advice, limited, stages
from temperament.report import charts
from temperament.report.html import html, read_run
from temperament.run.recipe import read
from temperament.run.study import carry_out
from temperament.run.tune import tune

LR = {"optim.adamw": {"lr": 1e-4}}
SFT = {"source": {"data.lab": {"skills": ["shift"]}}, "optimizer": LR, "batch": 4, "epochs": 1}
DPO = {
    "source": {"data.lab": {"skills": ["shift"], "pairs": True}},
    "objective": {"objectives.preference.dpo": {}},
    "optimizer": LR,
    "batch": 4,
    "epochs": 1,
}
EVALUATION = {
    "keep": False,
    "diagnose": [],
    "suites": [{"evaluate.lab": {"target": "shift", "retained": ["copy"], "items": 2}}],
}
RECIPE = {
    "base": "lab/lm",
    "check": False,
    "evaluation": EVALUATION,
    "steps": [{"name": "sft", "train": SFT}, {"name": "dpo", "train": DPO}],
}
COST = st.sampled_from([0.1, 0.25, 0.3, 0.5, 1.0, 1.5, 2.0, 7.0])


@settings(max_examples=300, deadline=None)
@given(
    st.floats(10, 5000).map(lambda b: round(b, 2)),
    COST,
    COST,
    st.lists(st.integers(0, 100).map(lambda s: s / 100), min_size=2, max_size=9, unique=True),
)
def test_a_split_conserves_the_budget_and_is_monotone(B, c_sft, c_pref, shares):
    study = Budget([B], sorted(shares), c_sft, c_pref)
    found = [study.split(B, s) for s in sorted(shares)]
    exact = lambda v: Fraction(str(v))
    for split in found:
        spent = split.demonstrations * exact(c_sft) + split.preferences * exact(c_pref)
        left = exact(B) - spent
        assert 0 <= left < (exact(c_sft) if split.share < 1 else exact(c_pref))  # less than one row
        assert abs(split.preferences * exact(c_pref) - exact(split.share) * exact(B)) < exact(c_pref)
    pairs, shown = [s.preferences for s in found], [s.demonstrations for s in found]
    assert pairs == sorted(pairs) and shown == sorted(shown, reverse=True)
    ends = study.split(B, 0.0), study.split(B, 1.0)
    assert ends[0].preferences == 0 and ends[1].demonstrations == 0


def test_the_ends_are_the_plain_methods():
    recipe = read({**RECIPE, "study": {"studies.budget": {"budgets": [8, 20], "shares": [0.0, 0.5, 1.0], "seeds": [3, 4]}}})
    planned = dict(recipe.study.plan(recipe, {}))
    assert len(planned) == 12 and next(iter(planned)) == ("8 at 0", 3)
    rows = lambda r: {s.name: s.train.source.rows for s in r.steps}
    plain = lambda r: read(r.plain())
    assert (
        rows(planned["20 at 0", 3]) == {"sft": 20}
        and rows(planned["20 at 1", 4]) == {"dpo": 20}
        and rows(planned["8 at 0.5", 4]) == {"sft": 4, "dpo": 4}
    )
    alone = json.loads(json.dumps(RECIPE))
    alone["steps"] = [{"name": "sft", "train": {**SFT, "source": {"data.lab": {"skills": ["shift"], "rows": 20}}}}]
    assert plain(planned["20 at 0", 3]) == replace(read(alone), seed=3)
    assert all(r.study is None and r.seed == k[1] for k, r in planned.items())
    quiet = read(
        {
            **RECIPE,
            "steps": [{**s, "ledger": False} for s in RECIPE["steps"]],
            "study": {"studies.budget": {"budgets": [8], "shares": [0.0, 0.5]}},
        }
    )
    assert [[s.ledger for s in r.steps] for _, r in quiet.study.plan(quiet, {})] == [
        [True],
        [False, True],
    ]  # its end is always measured
    few = read({**RECIPE, "study": {"studies.budget": {"budgets": [4], "shares": [0.0, 0.1, 0.2, 0.5]}}})
    assert [k for k, _ in few.study.plan(few, {})] == [
        ("4 at 0", 0),
        ("4 at 0.5", 0),
    ]  # shares that buy the same rows are one run


def test_only_preferences_begin_at_the_base(tmp_path, monkeypatch):
    """s = 1 is DPO on the base, to the bit; s = 0 is SFT."""
    monkeypatch.setenv("TEMPERAMENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("temperament.run.plan.plan", lambda recipe, base: {})
    recipe = read({**RECIPE, "study": {"studies.budget": {"budgets": [4], "shares": [0.0, 1.0]}}})
    finding = carry_out(recipe.study, recipe, tmp_path / "s")
    left = json.loads((tmp_path / "s" / "run.json").read_text())
    digest = lambda where: left["runs"][where]["digest"]
    for where, step in (("4 at 1/0", "dpo"), ("4 at 0/0", "sft")):
        one = json.loads(json.dumps(RECIPE))
        one["steps"] = [s for s in one["steps"] if s["name"] == step]
        one["steps"][0]["train"]["source"]["data.lab"]["rows"] = 4
        assert tune(one, tmp_path / step).json["delta"]["digest"] == digest(where)
    told = []
    again = carry_out(recipe.study, recipe, tmp_path / "s", lambda event, **data: told.append(event))
    assert "arm-done" not in told and again["finding"] == finding["finding"]  # finished runs are taken as they are
    wider = replace(recipe, study=replace(recipe.study, shares=[0.0, 0.5, 1.0]))
    carry_out(wider.study, wider, tmp_path / "s", lambda event, **data: told.append(event))
    assert told.count("arm-done") == 1  # and only what is new is run
    report = html(read_run(tmp_path / "s"))
    assert 'id="frontier"' in report and "Best spent: of 4" in report
    assert (tmp_path / "s" / "recipe.yaml").read_text().count("studies.budget") == 1
    with pytest.raises(UserError, match=r"study is .*temper compare"):
        tune(recipe, tmp_path / "refused")


def run(target, **more):
    return {
        "target": target,
        "worth": target,
        "unit": "points",
        "gain": 100 * target,
        "retained": 0.9,
        "loss": 1.0,
        "nll": None,
        "kl": None,
        "steps": 3,
        "seconds": 1.0,
        **more,
    }


def test_the_best_share_of_each_budget_is_read():
    study = parts.build({"studies.budget": {"budgets": [10, 100], "shares": [0.0, 0.5, 1.0], "seeds": [0, 1]}})
    means = {("10", "0"): 0.5, ("10", "0.5"): 0.3, ("10", "1"): 0.0, ("100", "0"): 0.6, ("100", "0.5"): 0.8, ("100", "1"): 0.1}
    spread = random.uniform(0.01, 0.05)
    done = {(f"{b} at {s}", seed): run(m + (spread if seed else -spread)) for (b, s), m in means.items() for seed in (0, 1)}
    found = study.read(done)
    assert [(r["budget"], r["share"]) for r in found["best"]] == [(10, 0.0), (100, 0.5)]
    assert [r["target"] for r in found["splits"]] == pytest.approx(list(means.values())) and all(
        r["runs"] == 2 for r in found["splits"]
    )
    assert "all on demonstrations (50 % on the target)" in found["advice"] and "The larger the budget" in found["advice"]
    assert study.chosen(found, done) == ("100 at 0.5", 0)
    front = study.frontier(found)
    assert front["lines"][1] == {"name": "budget 100", "x": [0.0, 0.5, 1.0], "y": pytest.approx([0.6, 0.8, 0.1])}
    drawn = charts.frontier(front)
    assert drawn["rows_label"] == front["rows_label"] == "demonstrations + preferences"  # its own words, of no other study
    assert "<polyline" in str(drawn["chart"]) and drawn["rows"][1]["target"] == "80 %" and charts.frontier({}) is None
    part = study.read({k: v for k, v in done.items() if k[0] == "10 at 0"})
    assert [r["share"] for r in part["best"]] == [0.0] and advice([]).startswith("Nothing")


def test_what_cannot_be_split_is_refused(tmp_path):
    only = {**RECIPE, "steps": RECIPE["steps"][:1]}
    for steps in (only, {**RECIPE, "steps": RECIPE["steps"][::-1]}):
        with pytest.raises(UserError, match="demonstrations and, after it, one on pairs"):
            stages(read(steps))
    path = write_rows(tmp_path / "r.jsonl", [{"prompt": f"{i}", "completion": "x"} for i in range(9)])
    with pytest.raises(UserError, match="holdout: 0"):
        limited(parts.build({"data.file": {"path": path}}), 4, "x")
    kept = limited(parts.build({"data.file": {"path": path, "holdout": 0}}), 4, "x")
    assert len(kept.examples()) == 4
    with pytest.raises(UserError, match="how many rows"):
        limited(parts.build({"data.mix": {"sources": [{"data.file": {"path": path}}], "weights": [1.0]}}), 4, "x")
    for bad in ({"budgets": []}, {"budgets": [5], "shares": [1.5]}, {"budgets": [5], "cost_sft": 0.0}, {"budgets": [0.5]}):
        with pytest.raises(UserError):
            parts.build({"studies.budget": bad})
    with pytest.raises(UserError, match=r"select\.full,adapters\.lora"):
        api.compare(only, out=tmp_path / "o")
