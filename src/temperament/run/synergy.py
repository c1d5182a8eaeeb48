"""What a merge has that its parents have not: synergy, skill by skill, and what of each parent survived.

    synergy(skill) = score(merge) - mean of score(parent)          over the same items, with a 95 % interval
    over best      = score(merge) - max of score(parent)
    diversity      = mean over items and pairs of parents of |score_i - score_j|: where they differ there is something to gain

Up means better, also where less is better. Source: Fine-tuning LLMs for domain adaptation (paper 166), its s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from temperament.run.outcome import SkillResult
from temperament.stats import t_interval

Row = Mapping[str, SkillResult]


def synergy(merged: Row, parents: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """{skill: {"merge", "parents", "synergy", "ci95", "over_best", "diversity", "n"}} of skills all of them have scores in."""
    out = {}
    for skill, result in merged.items():
        others = [p[skill] for p in parents if skill in p]
        if len(others) != len(parents) or len(others) < 2:
            continue
        scores = [{o.id: o.score for o in r.outcomes if o.score is not None} for r in (result, *others)]
        ids = [i for i in scores[0] if all(i in s for s in scores)]
        if not ids:
            continue
        sign = 1.0 if result.higher_is_better else -1.0
        mean = lambda s, ids=ids: sum(s[i] for i in ids) / len(ids)
        own, theirs = mean(scores[0]), [mean(s) for s in scores[1:]]
        paired = [sign * (scores[0][i] - sum(s[i] for s in scores[1:]) / len(others)) for i in ids]
        value, ci95 = t_interval(paired)
        pairs = [abs(a[i] - b[i]) for a, b in combinations(scores[1:], 2) for i in ids]
        out[skill] = {
            "merge": own,
            "parents": theirs,
            "synergy": value,
            "ci95": ci95,
            "over_best": min(sign * (own - t) for t in theirs),
            "diversity": sum(pairs) / len(pairs),
            "n": len(ids),
        }
    return out
