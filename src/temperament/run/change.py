"""One skill before and after: the paired change, its interval, the flips, and the smallest loss it could have shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from temperament import stats
from temperament.run import words
from temperament.run.outcome import Role, SkillResult, status
from temperament.stats import Interval


@dataclass(frozen=True)
class Graded:
    """A graded measure beside the score (answer NLL, KL to the base): lower is nearer to what the base knew."""

    n: int
    before: float
    after: float
    change: float
    ci95: Interval
    power: float  # smallest change seen with 80 % power


@dataclass(frozen=True)
class Change:
    """One skill, before and after. `change` = after - before as measured; `gain` is the same with up meaning better."""

    name: str
    role: Role
    metric: str
    kind: Literal["item", "set"]
    unit: str
    higher_is_better: bool
    distance: str | None
    n: int
    before: float | None
    after: float | None
    before_ci95: Interval | None
    after_ci95: Interval | None
    change: float | None
    ci95: Interval | None
    kept: int | None
    gained: int | None
    lost: int | None
    missed: int | None
    gained_items: tuple[str, ...]
    lost_items: tuple[str, ...]
    nll: Graded | None
    kl: Graded | None
    power: float | None  # smallest true loss this suite shows with 80 % power, in the measure's own unit
    floor: tuple[str, float] | None

    @property
    def gain(self) -> float | None:
        return self.change if self.higher_is_better or self.change is None else -self.change

    @property
    def gain_ci95(self) -> Interval | None:
        return self.ci95 if self.higher_is_better or self.ci95 is None else (-self.ci95[1], -self.ci95[0])

    @property
    def seen(self) -> Literal["gained", "lost", "none"]:
        """What the interval shows: a gain, a loss, or nothing."""
        if self.gain_ci95 is None or self.gain_ci95[0] <= 0 <= self.gain_ci95[1]:
            return "none"
        return "gained" if self.gain_ci95[0] > 0 else "lost"

    @property
    def blind(self) -> bool:
        """No loss could have been seen: the base has less to lose than the smallest visible loss."""
        return self.power is not None and self.unit == "points" and self.higher_is_better and self.power > (self.before or 0.0)

    def sentence(self) -> str | None:
        """What this suite could not have seen, in words."""
        return words.sentence(self)

    def to_json(self) -> dict[str, Any]:
        return plain({**asdict(self), "seen": self.seen, "blind": self.blind, "sentence": self.sentence()})


def compare(old: SkillResult | None, new: SkillResult | None) -> Change:
    how = new or old
    pairs = [(old.by_id[o.id] if old else None, o) for o in new.outcomes] if new else [(o, None) for o in old.outcomes]
    before, after, change, ci, spans, power, n = (_set_change if how.kind == "set" else _item_change)(how, old, new, pairs)
    counts: dict[str, list[str]] = {"kept": [], "gained": [], "lost": [], "missed": []}
    states = [(status(how, a, b), (b or a).id) for a, b in pairs]
    for state, item in states:
        if state is not None:
            counts[state].append(item)
    flips = any(state is not None for state, _ in states)
    return Change(
        how.skill, how.role, how.metric, how.kind, how.shown_unit, how.higher_is_better, how.distance, n,
        before, after, *spans, change, ci,
        *(len(counts[s]) if flips else None for s in ("kept", "gained", "lost", "missed")),
        tuple(counts["gained"]), tuple(counts["lost"]),
        _graded("nll", how.skill, pairs), _graded("kl", how.skill, pairs), power, how.floor if _floored(how, old) else None,
    )  # fmt: skip


def _floored(how: SkillResult, old: SkillResult | None) -> bool:
    return how.floor is not None and (old is None or old.mean is None)


def _item_change(how: SkillResult, old: SkillResult | None, new: SkillResult | None, pairs: list) -> tuple:
    """Mean of paired differences; against the floor, or alone, the mean of the one side that has scores."""
    both = [(a.score, b.score) for a, b in pairs if a and b and a.score is not None and b.score is not None]
    if both:
        x, y = np.asarray(both, dtype=float).T
        ci = _interval(y - x, how, how.skill, "change", paired=True)
        spans = _interval(x, how, how.skill, "level"), _interval(y, how, how.skill, "level")
        return float(x.mean()), float(y.mean()), float((y - x).mean()), ci, spans, _power(how, x, y, ci), len(both)
    sides = []
    for side in (0, 1):
        scores = [p[side].score for p in pairs if p[side] is not None and p[side].score is not None]
        sides.append((float(np.mean(scores)), _interval(scores, how, how.skill, "level"), len(scores)) if scores else None)
    (b0, s0, n0), (b1, s1, n1) = (side or (None, None, 0) for side in sides)
    if b0 is None and b1 is not None and how.floor is not None:  # no score before: the floor is a constant
        base = how.floor[1]
        return base, b1, b1 - base, s1 and (s1[0] - base, s1[1] - base), (None, s1), None, n1
    return b0, b1, None, None, (s0, s1), None, n0 or n1


def _set_change(how: SkillResult, old: SkillResult | None, new: SkillResult | None, pairs: list) -> tuple:
    spans = tuple(stats.percentile_interval(r.draws) if r and r.draws else None for r in (old, new))
    n = len(pairs)
    if old is not None and new is not None:
        paired = old.draws and len(old.draws) == len(new.draws)
        ci = stats.percentile_interval(np.subtract(new.draws, old.draws)) if paired else None
        return old.value, new.value, new.value - old.value, ci, spans, None, n
    if new is not None and how.floor is not None:
        base = how.floor[1]
        ci = (spans[1][0] - base, spans[1][1] - base) if spans[1] else None
        return base, new.value, new.value - base, ci, spans, None, n
    return old.value if old else None, new.value if new else None, None, None, spans, None, n


def _interval(x: Sequence[float], how: SkillResult, *address: str, paired: bool = False) -> Interval | None:
    if how.bounds is None:
        return stats.bootstrap_interval(x, *address) if len(x) > 1 else None
    low, high = how.bounds
    return stats.score_interval(x, low - high, high - low) if paired else stats.score_interval(x, low, high)


def _power(how: SkillResult, x: np.ndarray, y: np.ndarray, ci: Interval | None) -> float | None:
    """Smallest visible loss (or gain): exact for 0/1 scores, the flips both ways seen here as noise; else from the spread, and
    not below what the interval itself, which guards against rare large losses, could tell from none."""
    n, moved = len(x), y - x
    spread = float(np.std(moved, ddof=1)) if n > 1 else math.inf
    if how.bounds is None:
        return stats.smallest_mean_seen(n, spread) if n > 1 else None
    width = how.bounds[1] - how.bounds[0]
    if np.isin(np.concatenate([x, y]), how.bounds).all():
        return width * stats.smallest_seen(n, float(min(np.mean(moved > 0), np.mean(moved < 0))))
    if spread < 1e-12 * width or not math.isfinite(spread):  # nothing moved: a loss would come as a few whole items
        return width * stats.smallest_seen(n)
    reach = stats.smallest_mean_seen(n, spread)
    guarded = (
        reach / (stats.quantile(0.5 + stats.LEVEL / 2) * spread / math.sqrt(n)) * (float(moved.mean()) - ci[0]) if ci else 0.0
    )
    return min(width, max(reach, guarded))


def _graded(measure: str, skill: str, pairs: list) -> Graded | None:
    """Paired change of NLL or KL. The base's KL to itself is 0, so a missing KL before is 0."""
    if measure == "kl":
        rows = [((a.kl if a else None) or 0.0, b.kl) for a, b in pairs if b and b.kl is not None]
    else:
        rows = [(a.nll, b.nll) for a, b in pairs if a and b and a.nll is not None and b.nll is not None]
    rows = [r for r in rows if all(map(math.isfinite, r))]
    if len(rows) < 2:
        return None
    x, y = np.asarray(rows, dtype=float).T
    spread = float(np.std(y - x, ddof=1))
    ci = stats.bootstrap_interval(y - x, skill, measure)
    return Graded(len(x), float(x.mean()), float(y.mean()), float((y - x).mean()), ci, stats.smallest_mean_seen(len(x), spread))


def mean_gain(changes: Sequence[Change]) -> dict[str, Any] | None:
    parts = [(c.gain, c.gain_ci95) for c in changes if c.gain is not None and c.gain_ci95 is not None]
    if not parts:
        return None
    value, ci = stats.mover(parts)
    return {"value": value, "ci95": list(ci), "skills": len(parts)}


def retained(changes: Sequence[Change]) -> dict[str, Any] | None:
    """All retained skills as one number: macro mean of gains, its interval, the worst skill; near, middle and far apart."""
    kept = [c for c in changes if c.role == "retained" and c.unit == "points" and c.gain_ci95 is not None]
    if not kept:
        return None
    worst = min(kept, key=lambda c: c.gain)
    groups = {d: [c for c in kept if c.distance == d] for d in ("near", "middle", "far")}
    return {
        **mean_gain(kept),
        "worst": {"name": worst.name, "gain": worst.gain, "ci95": list(worst.gain_ci95)},
        "seen_lost": [c.name for c in kept if c.seen == "lost"],
        "seen_gained": [c.name for c in kept if c.seen == "gained"],
        "by_distance": {d: mean_gain(group) for d, group in groups.items() if group},
    }


def changes_from_json(data: Mapping[str, Any]) -> tuple[Change, ...]:
    """The skills of a run.json's ledger as `Change` values, equal to those that were written."""
    known = {f.name for f in fields(Change)}
    out = []
    for skill in data["skills"]:
        kept = {k: tuple(v) if isinstance(v, list) else v for k, v in skill.items() if k in known}
        for measure in ("nll", "kl"):
            if kept.get(measure) is not None:
                kept[measure] = Graded(**{**kept[measure], "ci95": tuple(kept[measure]["ci95"])})
        out.append(Change(**kept))
    return tuple(out)


def plain(x: Any) -> Any:
    """JSON without NaN or infinities (they become null), tuples as lists, numpy scalars as numbers."""
    if isinstance(x, Mapping):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if isinstance(x, np.generic):
        x = x.item()
    return None if isinstance(x, float) and not math.isfinite(x) else x
