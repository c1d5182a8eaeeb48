"""Comparisons: which runs are planned, which rate is kept, what is read of them; and one small one carried out."""

import json
import random
from types import SimpleNamespace

import pytest
from tiny import seed

from temperament import parts
from temperament.errors import UserError
from temperament.methods.studies.compare import Compare, arms_of, times
from temperament.protocols import Progress
from temperament.run.claims import Lab
from temperament.run.recipe import read
from temperament.run.study import carry_out, summary
from temperament.stats import t_interval

TRAIN = {
    "source": {"data.lab": {"skills": ["shift"], "rows": 16}},
    "steps": 1,
    "batch": 4,
    "optimizer": {"optim.adamw": {"lr": 1e-4}},
}
RECIPE = {
    "base": "lab/lm",
    "check": False,
    "steps": [{"name": "a", "train": TRAIN}],
    "evaluation": {
        "keep": False,
        "diagnose": [],
        "suites": [{"evaluate.lab": {"target": "shift", "retained": ["copy"], "items": 2}}],
    },
}


def compare(**arms) -> Compare:
    seeds = arms.pop("seeds", [0])
    return parts.build(
        {"studies.compare": {"arms": {n: {"trainable": t, "rates": r} for n, (t, r) in arms.items()}, "seeds": seeds}}
    )


def run(target=0.9, gain=50.0, loss=1.0, reached=True, **more):
    return {
        "target": target,
        "worth": target,
        "unit": "points",
        "gain": gain,
        "retained": 1 - (loss or 0) / 100,
        "loss": loss,
        "near_loss": loss,
        "nll": 0.1,
        "kl": 0.2,
        "reached": reached,
        "steps": 3,
        "seconds": 1.0,
        "parameters": 7,
        **more,
    }


def lr(recipe, at=Progress(9, 10)):
    return parts.at(recipe.steps[0].train.optimizer, at).lr


def test_arms_run_the_recipe_with_their_own_method_and_rate():
    study, recipe = (
        compare(full=("select.full", []), lora=("adapters.lora", []), half=("select.half", [3e-4]), seeds=[4, 5]),
        read(RECIPE),
    )
    planned = dict(study.plan(recipe, {}))
    assert list(planned) == [
        ("full", 4, None),
        ("full", 5, None),
        ("lora", 4, None),
        ("lora", 5, None),
        ("half", 4, 3e-4),
        ("half", 5, 3e-4),
    ]
    full, lora, half = (planned[w] for w in (("full", 4, None), ("lora", 5, None), ("half", 4, 3e-4)))
    assert (
        lr(full) == pytest.approx(1e-4) and lr(lora) == pytest.approx(1e-3) and lr(half) == pytest.approx(3e-4)
    )  # LoRA's usual rate is ten times
    assert [r.seed for r in planned.values()] == [4, 5] * 3 and full.steps[0].train.trainable == [parts.build("select.full")]
    assert recipe == read(RECIPE)


@pytest.mark.parametrize(
    "schedule",
    [
        {"schedules.cosine": {"peak": 1e-4, "end": 1e-5, "warmup": 3}},
        {"schedules.constant": {"value": 1e-4}},
        {"schedules.steps": {"values": [1e-4, 1e-5], "at": [0.5]}},
        {"schedules.linear": {"start": 1e-4}},
    ],
)
def test_rates_keep_the_shape_of_their_schedule(schedule):
    recipe = json.loads(json.dumps(RECIPE))
    recipe["steps"][0]["train"]["optimizer"] = {"optim.adamw": {"lr": schedule}}
    recipe, study = read(recipe), compare(lora=("adapters.lora", []), full=("select.full", [5e-4]))
    (_, lora), (_, full) = study.plan(recipe, {})
    for k in range(10):
        want = lr(recipe, Progress(k, 10))
        assert lr(lora, Progress(k, 10)) == pytest.approx(10 * want) and lr(full, Progress(k, 10)) == pytest.approx(5 * want)
    assert times(2.0, 3.0) == 6.0


def test_the_rate_kept_reached_the_level_and_lost_least():
    study = compare(a=("select.full", [1.0, 2.0, 3.0]), seeds=[0, 1])
    done, planned = {}, []
    results = {1.0: run(0.5, reached=False), 2.0: run(loss=4.0), 3.0: run(loss=2.0)}
    for where, _ in study.plan(read(RECIPE), done):
        planned.append(where)
        done[where] = results[where[2]]
    assert planned == [("a", 0, 1.0), ("a", 0, 2.0), ("a", 0, 3.0), ("a", 1, 3.0)]
    assert (
        study.best_rate("a", [1.0, 2.0], {("a", 0, 1.0): run(0.5, reached=False), ("a", 0, 2.0): run(0.7, reached=False)})
        == 2.0
    )
    assert (
        study.best_rate("a", [1.0, 2.0], {("a", 0, 1.0): run(loss=1.0), ("a", 0, 2.0): run(loss=1.0)}) == 1.0
    )  # alike: the gentler
    assert study.read(done)["arms"][0]["rate"] == 3.0 and len(study.read(done)["arms"][0]["runs"]) == 2


def nats(before, after, reached=False, kept=1.0):
    """run.json of a run whose target is measured in nats."""
    skill = lambda name, role, a, b, **more: {"name": name, "role": role, "unit": "points", "before": a, "after": b,
                                              "change": b - a, "higher_is_better": True, **more}  # fmt: skip
    skills = [skill("text", "target", before, after, unit="nats", higher_is_better=False), skill("copy", "retained", 1.0, kept)]
    steps = [{"kind": "train", "stopped": "there" if reached else ""}]
    return {"ledger": {"skills": skills}, "steps": steps, "cost": {"seconds": 1.0}}


def test_of_nats_less_is_better(tmp_path, monkeypatch):
    low, high = sorted(random.uniform(0.5, 3.0) for _ in range(2))
    good, bad = summary(nats(3.5, low)), summary(nats(3.5, high))
    assert good["gain"] == pytest.approx(100 * (3.5 - low)) and good["target"] == low and good["worth"] == -low
    study = compare(a=("select.full", [1.0, 2.0]))
    assert study.best_rate("a", [1.0, 2.0], {("a", 0, 1.0): good, ("a", 0, 2.0): bad}) == 1.0
    lab = Lab(tmp_path)
    monkeypatch.setattr(Lab, "tune", lambda self, name, recipe, seed: dict(good if recipe == 1.0 else bad))
    assert lab.best("m", lambda rate: rate, [1.0, 2.0], 0)["rate"] == 1.0
    found = compare(a=("select.full", []), b=("select.full", [])).read({("a", 0, None): good, ("b", 0, None): bad})
    assert [r["front"] for r in found["arms"]] == [True, False] and found["arms"][0]["unit"] == "nats"


def test_an_experiment_has_the_seed_it_is_given_however_its_recipe_is(tmp_path, monkeypatch):
    seen, done = [], SimpleNamespace(json={"cost": {"seconds": 1.0}})
    keep = lambda recipe, folder, **how: (seen.append((recipe, folder.name)), done)[1]
    monkeypatch.setattr("temperament.run.claims.tune", keep)
    for recipe in ({"base": "lab/lm", "seed": 3}, read({"base": "lab/lm", "seed": 3})):
        Lab(tmp_path).run("a", recipe, 7)
    assert [(r.seed, name) for r, name in seen] == [(7, "a-7")] * 2 and seen[0][0] == seen[1][0]


def test_the_front_holds_what_nothing_beats():
    study = compare(**{n: ("select.full", []) for n in "abcd"})
    values = {"a": (50, 5), "b": (60, 5), "c": (40, 1), "d": (60, 9)}
    found = study.read({(n, 0, None): run(gain=g, loss=x) for n, (g, x) in values.items()})
    assert {a["name"]: a["front"] for a in found["arms"]} == {"a": False, "b": True, "c": True, "d": False}
    assert study.chosen(found, {}) == ("c", 0, None)
    missing = {(n, 0, None): run(gain=None, loss=None) for n in "abcd"}
    assert all(a["front"] for a in study.read(missing)["arms"])  # nothing measured: nothing beaten, and no crash


@pytest.mark.parametrize("n", [2, 3, 5, 10, 17, 40])
def test_the_interval_is_scipys(n):
    stats = pytest.importorskip("scipy.stats")
    values = [random.gauss(3, 2) for _ in range(n)]
    mean, (low, high) = t_interval(values)
    want = stats.t.interval(0.95, n - 1, loc=mean, scale=stats.sem(values))
    assert (
        mean == pytest.approx(sum(values) / n)
        and (high - low) == pytest.approx(want[1] - want[0], rel=5e-3)
        and (low + high) / 2 == pytest.approx(mean)
    )
    assert t_interval(values[:1]) == (values[0], None)


def test_arms_by_name():
    assert list(arms_of(["select.full", "adapters.lora"])) == ["select.full", "adapters.lora"]
    for wrong, why in (
        (["select.full", "select.full"], "named twice"),
        (["select.fall"], "select.full"),
        (["data.mix"], "select or adapters"),
        (["merge.linear"], "has no build"),
    ):
        with pytest.raises(UserError, match=why):
            arms_of(wrong)
    with pytest.raises(UserError, match="at least one arm"):
        compare(seeds=[0])


def test_carried_out_once_and_read_from_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPERAMENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("temperament.run.plan.plan", lambda recipe, base: {})
    study, recipe, told = (
        compare(half=("select.half", []), lora=({"adapters.lora": {"rank": 2}}, [1e-3, 2e-3]), seeds=[seed()]),
        read(RECIPE),
        [],
    )
    finding = carry_out(study, recipe, tmp_path / "s", lambda event, **data: told.append(event))
    assert told.count("arm-done") == 3 and [a["name"] for a in finding["finding"]["arms"]] == ["half", "lora"]
    again = carry_out(study, recipe, tmp_path / "s", lambda event, **data: told.append(event))
    assert told.count("arm-done") == 3 and again["finding"] == finding["finding"]  # finished runs are taken as they are
    left = json.loads((tmp_path / "s" / "run.json").read_text())
    assert left["kind"] == "study" and left["status"] == "done" and len(left["runs"]) == 3
    one = json.loads((tmp_path / "s" / next(iter(left["runs"].values()))["folder"] / "run.json").read_text())
    got, skills = summary(one), {s["name"]: s for s in one["ledger"]["skills"]}
    assert got["gain"] == pytest.approx(100 * skills["shift"]["change"]) and got["loss"] == pytest.approx(
        -100 * skills["copy"]["change"]
    )
    assert got["digest"] == one["delta"]["digest"] and got["steps"] == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").touch()
    with pytest.raises(UserError, match="other files"):
        carry_out(study, recipe, tmp_path / "mine")
