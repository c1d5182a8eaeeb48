"""Synergy by its definition, item by item; a merge's ledger has a row for the base, each source and the merge."""

import random

import pytest

from temperament.run.outcome import Outcome, SkillResult
from temperament.run.synergy import synergy


def result(scores, **more):
    outcomes = tuple(Outcome(f"i{k}", "s", "", "", "", v) for k, v in enumerate(scores))
    return {"s": SkillResult("s", "retained", "exact", outcomes, **more)}


def test_the_definition():
    n = 40
    m, a, b = ([float(random.random() < 0.5) for _ in range(n)] for _ in range(3))
    found = synergy(result(m), [result(a), result(b)])["s"]
    mean = lambda v: sum(v) / n
    assert found["synergy"] == pytest.approx(mean(m) - (mean(a) + mean(b)) / 2)
    assert found["over_best"] == pytest.approx(mean(m) - max(mean(a), mean(b))) and found["n"] == n
    assert found["diversity"] == pytest.approx(mean([abs(x - y) for x, y in zip(a, b, strict=True)]))
    low, high = found["ci95"]
    assert low < found["synergy"] < high
    less = synergy(result(m, higher_is_better=False), [result(a), result(b)])["s"]
    assert less["synergy"] == pytest.approx(-found["synergy"]) and less["over_best"] == pytest.approx(
        min(mean(a), mean(b)) - mean(m)
    )


def test_a_merge_of_equals_has_none_and_what_was_not_scored_is_left_out():
    m = [1.0, 0.0, 1.0, None]
    same = synergy(result(m), [result(m), result(m), result(m)])["s"]
    assert same["synergy"] == same["over_best"] == same["diversity"] == 0 and same["n"] == 3
    assert synergy(result(m), [result(m)]) == {}  # one parent is no merge
    assert synergy(result([None]), [result([None])] * 2) == {}
