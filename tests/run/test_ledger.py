"""The ledger's statistics against closed forms, brute force, exact enumeration and simulation."""

import json
import math
import secrets
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temperament import stats
from temperament.errors import UserError
from temperament.run.change import compare
from temperament.run.ledger import Ledger, Outcome, SkillResult, by_skill, changes_from_json, set_level

Z = 1.959963984540054
rng = np.random.default_rng()


def result(name, scores, role="retained", nll=None, kl=None, **how):
    n = len(scores)
    return SkillResult(
        name, role, "exact match",
        tuple(
            Outcome(f"{name}/{i}", name, f"prompt {i}", f"want {i}", f"said {scores[i]}", scores[i],
                    None if nll is None else nll[i], None if kl is None else kl[i])
            for i in range(n)
        ), **how,
    )  # fmt: skip


def two(before, after, **how):
    return Ledger({"base": by_skill([result("s", before, **how)]), "tuned": by_skill([result("s", after, **how)])})


def tango(gained, lost, n):
    """Tango's closed form for the difference of paired proportions, by bisection on its score statistic."""

    def statistic(d):
        a, b, c = 2 * n, -gained - lost + (2 * n - gained + lost) * d, -lost * d * (1 - d)
        q = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        return (gained - lost - n * d) / math.sqrt(max(1e-300, n * (2 * q + d * (1 - d))))

    def solve(target):
        low, high = -1.0, 1.0
        for _ in range(100):
            mid = (low + high) / 2
            low, high = (mid, high) if statistic(mid) > target else (low, mid)
        return low

    return solve(Z), solve(-Z)


def wilson(k, n):
    centre, half = (k + Z * Z / 2) / (n + Z * Z), Z * math.sqrt(k * (n - k) / n + Z * Z / 4) / (n + Z * Z)
    return centre - half, centre + half


# -- intervals ----------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, n))))
def test_score_interval_is_tango_on_pairs_and_wilson_on_one_sample(case):
    n, gained, lost = case
    lost = min(lost, n - gained)
    pairs = [1] * gained + [-1] * lost + [0] * (n - gained - lost)
    assert stats.score_interval(pairs, -1, 1) == pytest.approx(tango(gained, lost, n), abs=1e-6)
    ones = [1] * gained + [0] * (n - gained)
    assert stats.score_interval(ones, 0, 1) == pytest.approx(wilson(gained, n), abs=1e-6)


def test_exact_coverage_of_paired_interval():
    """Sum over all tables of 30 pairs: coverage is near 95 % also where hardly anything changes."""
    n = 30
    table = [(g, m) for g in range(n + 1) for m in range(n + 1 - g)]
    inside = {(g, m): stats.score_interval([1] * g + [-1] * m + [0] * (n - g - m), -1, 1) for g, m in table}
    for p_gain, p_loss in ((0.0, 0.02), (0.01, 0.01), (0.05, 0.2), (0.3, 0.3), (0.6, 0.02), (0.0, 0.5), (0.02, 0.9)):
        rest, covered = 1 - p_gain - p_loss, 0.0
        for g, m in table:
            mass = math.comb(n, g) * math.comb(n - g, m) * p_gain**g * p_loss**m * rest ** (n - g - m)
            low, high = inside[g, m]
            covered += mass * (low <= p_gain - p_loss <= high)
        assert covered > 0.92, (p_gain, p_loss, covered)


@pytest.mark.parametrize("rare", [0.05, 0.5])
def test_coverage_of_graded_bounded_scores(rare):
    """Most differences zero, a few large losses: where a percentile bootstrap covers far too seldom."""
    n, trials, hit, loss = 40, 400, 0, 0.6
    for _ in range(trials):
        d = -np.where(rng.random(n) < rare, rng.beta(3, 2, n), 0.0)
        low, high = stats.score_interval(d, -1, 1)
        hit += low <= -rare * loss <= high
    assert hit / trials > 0.90, hit / trials


def test_coverage_of_bootstrap_on_skewed_nll():
    n, trials, hit = 40, 250, 0
    for i in range(trials):
        d = np.where(rng.random(n) < 0.7, rng.normal(0, 0.05, n), rng.gamma(1.5, 1.0, n))
        low, high = stats.bootstrap_interval(d, "trial", i, draws=600)
        hit += low <= 0.45 <= high
    assert hit / trials > 0.88, hit / trials


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_score_interval_holds_the_mean_stays_in_bounds_and_mirrors(x):
    low, high = stats.score_interval(x, 0, 1)
    assert 0 <= low <= np.mean(x) + 1e-9 and np.mean(x) - 1e-9 <= high <= 1
    assert stats.score_interval([1 - v for v in x], 0, 1) == pytest.approx((1 - high, 1 - low), abs=1e-6)


def test_streams_are_addressed_not_ordered():
    assert (stats.resamples(20, "a", 1) == stats.resamples(20, "a", 1)).all()
    assert (stats.resamples(20, "a", 1) != stats.resamples(20, "a", 2)).any()
    code = "from temperament import stats; print(stats.stream('x', 3).integers(1 << 62))"
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert runs == {f"{stats.stream('x', 3).integers(1 << 62)}\n"}


def test_mover_of_one_is_itself_and_of_symmetric_is_root_mean():
    assert stats.mover([(0.3, (0.1, 0.6))]) == (0.3, pytest.approx((0.1, 0.6)))
    value, (low, high) = stats.mover([(0.0, (-0.1, 0.1))] * 4)
    assert (value, low, high) == pytest.approx((0.0, -0.05, 0.05))


# -- power --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "churn"), [(26, 0.0), (100, 0.0), (60, 0.05)])
def test_power_is_what_simulation_sees(n, churn):
    loss = stats.smallest_seen(n, churn)
    draws = rng.multinomial(n, [churn + loss, churn, 1 - loss - 2 * churn], size=4000)
    seen = np.mean([stats.score_interval([-1] * a + [1] * b + [0] * c, -1, 1)[1] < 0 for a, b, c in draws[:400]])
    quick = np.mean(draws[:, 0] - draws[:, 1] > Z * np.sqrt(draws[:, 0] + draws[:, 1]))
    assert abs(quick - 0.8) < 0.03
    assert abs(seen - 0.8) < 0.08  # the interval excludes zero exactly when the test refuses it


def test_power_shrinks_with_items_and_gives_up_on_three():
    sizes = [stats.smallest_seen(n) for n in (10, 26, 100, 1000, 10_000)]
    assert sizes == sorted(sizes, reverse=True) and sizes[2] == pytest.approx(0.0545, abs=0.001)
    assert stats.smallest_seen(3) == 1.0
    assert stats.smallest_seen(500, 0.05) == pytest.approx(stats.smallest_seen(400, 0.05), rel=0.15)  # exact meets normal


# -- changes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["binary", "graded", "lower", "unbounded"])
def test_identity(kind):
    n = 50
    scores = {
        "binary": rng.integers(0, 2, n).astype(float), "graded": rng.random(n),
        "lower": rng.random(n), "unbounded": rng.normal(5, 3, n),
    }[kind].tolist()  # fmt: skip
    how = {"lower": {"higher_is_better": False}, "unbounded": {"bounds": None, "passes": None}}.get(kind, {})
    change = two(scores, scores, nll=rng.random(n).tolist(), **how).changes[0]
    assert change.change == 0 and change.ci95[0] <= 0 <= change.ci95[1] and change.seen == "none"
    assert not change.gained_items and not change.lost_items
    assert change.gained in (0, None) and change.lost in (0, None)
    assert change.nll.change == 0 and change.nll.ci95 == (0, 0)
    assert 0 < change.power <= 1 or kind == "unbounded"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=80))
def test_counts_by_brute_force(pairs):
    change = two([float(a) for a, _ in pairs], [float(b) for _, b in pairs]).changes[0]
    names = {(1, 1): "kept", (0, 1): "gained", (1, 0): "lost", (0, 0): "missed"}
    for key, name in names.items():
        assert getattr(change, name) == pairs.count(key)
    assert change.lost_items == tuple(f"s/{i}" for i, p in enumerate(pairs) if p == (1, 0))
    assert change.gained_items == tuple(f"s/{i}" for i, p in enumerate(pairs) if p == (0, 1))
    assert change.kept + change.gained + change.lost + change.missed == change.n == len(pairs)
    assert change.change == pytest.approx((change.gained - change.lost) / change.n)
    assert change.ci95[0] <= change.change <= change.ci95[1]


def test_lower_is_better_turns_gain_and_flips():
    change = two([0.9, 0.9, 0.1], [0.1, 0.9, 0.9], higher_is_better=False).changes[0]
    assert (change.gained, change.lost) == (1, 1)
    change = two([0.9] * 30, [0.1] * 30, higher_is_better=False).changes[0]
    assert change.change == pytest.approx(-0.8) and change.gain == pytest.approx(0.8) and change.seen == "gained"


def test_nll_and_kl_need_no_scores():
    n = 60
    nll = rng.random(n)
    kl = rng.random(n) + 0.1
    old = result("s", [None] * n, nll=nll.tolist())
    new = result("s", [None] * n, nll=(nll + 0.5 + 0.01 * rng.random(n)).tolist(), kl=kl.tolist())
    change = Ledger({"base": {"s": old}, "sft": {"s": new}}).changes[0]
    assert change.change is None and change.kept is None
    assert change.nll.change == pytest.approx(0.505, abs=0.01) and change.nll.ci95[0] > 0.4
    assert change.kl.before == 0 and change.kl.after == pytest.approx(kl.mean())


def test_floor_stands_in_for_a_base_without_a_score():
    head = result("labels", [1.0] * 45 + [0.0] * 15, role="target", floor=("majority class", 0.4))
    change = Ledger({"base": {}, "tuned": {"labels": head}}).changes[0]
    assert change.before == 0.4 and change.change == pytest.approx(0.35) and change.floor == ("majority class", 0.4)
    assert change.ci95 == pytest.approx(tuple(v - 0.4 for v in wilson(45, 60)), abs=1e-6) and change.kept is None
    assert "floor 40 %" in Ledger({"base": {}, "tuned": {"labels": head}}).verdict


def test_set_level_metric_is_paired_by_resample():
    x = rng.normal(0, 1, (80, 2))
    items = [Outcome(f"i{k}", "spread") for k in range(80)]
    value = lambda data: lambda rows: float(np.linalg.det(np.cov(data[rows].T)))
    old = set_level("spread", "retained", "diversity", items, value(x))
    new = set_level("spread", "retained", "diversity", items, value(x * 0.5))
    same = Ledger({"a": {"spread": old}, "b": {"spread": old}}).changes[0]
    assert same.change == 0 and same.ci95 == (0, 0) and same.kept is None
    less = Ledger({"a": {"spread": old}, "b": {"spread": new}}).changes[0]
    assert less.ci95[0] <= less.change <= less.ci95[1] < 0 and less.seen == "lost"
    assert less.before == pytest.approx(value(x)(np.arange(80)))


# -- many rows ------------------------------------------------------------------------------------------------------------


def continual():
    levels = {"A": [0.0, 1.0, 0.5], "B": [0.1, 0.3, 0.9], "old": [1.0, 0.8, 0.7]}
    taught = {"A": 1, "B": 2}
    rows = {}
    for i, row in enumerate(("base", "task A", "task B")):
        rows[row] = by_skill(
            result(s, [float(k < round(50 * v[i])) for k in range(50)], "target" if taught.get(s) == i else "retained")
            for s, v in levels.items()
        )
    return Ledger(rows)


def test_matrix_and_transfer():
    m = continual().matrix
    assert m["rows"] == ["base", "task A", "task B"] and m["skills"] == ["A", "B", "old"]
    assert m["values"] == [[0.0, 0.1, 1.0], [1.0, 0.3, 0.8], [0.5, 0.9, 0.7]]
    assert m["learned"] == {"A": "task A", "B": "task B"}
    assert m["backward_transfer"]["value"] == pytest.approx(-0.5) and m["backward_transfer"]["ci95"][1] < 0
    assert m["forward_transfer"]["value"] == pytest.approx(0.2)
    assert m["average"] == pytest.approx(0.7)


def test_a_system_around_the_base_has_learned_nothing_yet():
    whole = continual()
    rows = list(whole.rows.items())
    around = replace(whole, rows=dict([rows[0], ("inference", rows[1][1]), *rows[1:]]), learned={})
    assert around.matrix["learned"] == replace(whole, learned={}).matrix["learned"]
    alone = replace(whole, rows=dict([rows[0], ("inference", rows[1][1])]), learned={})
    assert set(alone.matrix["learned"].values()) == {"inference"}


def test_retained_summary():
    summary = continual().retained
    assert summary["value"] == pytest.approx(-0.3) and summary["worst"]["name"] == "old" and summary["seen_lost"] == ["old"]


def test_other_items_are_refused():
    with pytest.raises(UserError, match="the same items"):
        Ledger({"base": {"s": result("s", [1.0, 0.0])}, "sft": {"s": result("s", [1.0])}})


# -- words and JSON -------------------------------------------------------------------------------------------------------


def example():
    n = 100
    old = [
        result("shift", [1.0] * 32 + [0.0] * 68, "target"),
        result("reverse", [1.0] * n, distance="near", nll=[0.1] * n),
        result("add", [1.0] * 98 + [0.0] * 2, distance="far", nll=rng.random(n).tolist()),
    ]
    new = [
        result("shift", [1.0] * 93 + [0.0] * 7, "target"),
        result("reverse", [1.0] * 6 + [0.0] * 94, distance="near", nll=[2.1] * n),
        result("add", [1.0] * 98 + [0.0] * 2, distance="far", nll=(rng.random(n) + 0.6).tolist()),
    ]
    return Ledger({"base": by_skill(old), "sft": by_skill(new)})


def test_verdict_says_it_plainly():
    said = example().verdict
    assert said.startswith("Gained 61 points on `shift` (32 % to 93 %, 95 % interval +5")
    assert "Lost 94 points on `reverse` (100 % to 6 %" in said
    assert "Nothing else seen lost on `add`, but with 100 items a loss under 5 points is invisible." in said
    assert "`add` grew less likely (NLL +0." in said


def test_of_a_target_that_shows_no_gain_the_answers_may_still_be_likelier():
    made = lambda nll: [Outcome(str(i), "s", "", "", "", 0.0, nll=nll + 0.01 * i) for i in range(20)]
    rows = {row: {"s": SkillResult("s", "target", "exact", tuple(made(n)))} for row, n in (("base", 2.5), ("after", 0.5))}
    assert "the right answers of `s` grew more likely (NLL 2.59 to 0.59 nats a token)" in Ledger(rows).verdict
    assert "likely" not in Ledger({"base": rows["base"], "after": rows["base"]}).verdict


def test_verdict_of_nothing():
    flat = [0.0] * 20
    assert "No gain seen on `s` (0 % to 0 %" in two(flat, flat, role="target").verdict
    assert "nothing can be said about loss" in two(flat, flat, role="target").verdict
    said = two(flat, flat).verdict
    assert "No target skill was named." in said and "no loss could have been seen" in said


def test_json_round_trip_and_contract():
    ledger = example()
    data = json.loads(json.dumps(ledger.to_json(items=True), allow_nan=False))
    assert Ledger.from_json(data) == ledger
    assert changes_from_json(data) == ledger.changes
    assert changes_from_json(json.loads(json.dumps(ledger.to_json()))) == ledger.changes
    for skill in data["skills"]:
        assert {"name", "role", "metric", "n", "before", "after", "change", "ci95", "kept", "gained", "lost"} <= set(skill)
    with pytest.raises(UserError, match="items=True"):
        Ledger.from_json(ledger.to_json())


def test_json_has_no_nan_and_equal_input_gives_equal_bytes():
    ledger = two([float("nan")] * 3, [1.0] * 3)
    json.dumps(ledger.to_json(items=True), allow_nan=False)
    a, b = (json.dumps(Ledger(dict(example_fixed().rows)).to_json()) for _ in range(2))
    assert a == b


def example_fixed():
    n, g = 40, np.random.default_rng(5)
    old, new = (result("s", g.random(n).tolist(), nll=g.random(n).tolist()) for _ in range(2))
    return Ledger({"base": {"s": old}, "sft": {"s": new}})


def test_items_side_by_side():
    rows = two([1.0, 0.0], [0.0, 1.0]).items("s")
    assert [r["status"] for r in rows] == ["lost", "gained"]
    assert rows[0]["before"] == "said 1.0" and rows[0]["after"] == "said 0.0" and rows[0]["prompt"] == "prompt 0"


def test_ledger_imports_no_torch():
    code = "import sys, temperament.run.ledger; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_loss_that_was_not_seen_is_not_called_visible():
    """Graded scores in bounds: whatever was measured, a change whose interval holds 0 is below the stated power."""
    rng = np.random.default_rng(secrets.randbits(32))
    for _ in range(40):
        x = np.ones(64)
        y = np.where(rng.random(64) < 0.12, rng.random(64), 1.0 - 0.02 * rng.random(64))
        rows = [[Outcome(str(i), "keep", "", "", "", float(v)) for i, v in enumerate(side)] for side in (x, y)]
        c = compare(*(SkillResult("keep", "retained", "agree", tuple(r)) for r in rows))
        assert c.ci95[1] < 0 or -c.change <= c.power, (c.change, c.ci95, c.power)
