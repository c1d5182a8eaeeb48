"""The ledger: the same items before and after, paired; what was kept, gained and lost, and what the suite could not have seen.

    Outcome -> SkillResult (one skill, one model) -> Ledger (rows of skills) -> Change (per skill) -> words

A ledger is an ordered list of rows, one for the base and one after each step; before/after is its two-row case, and with more
rows it is a matrix of skills by steps with backward and forward transfer. A measure is a mean over items (0/1, graded or
unbounded) or a set-level value (FID-like, diversity) with its own bootstrap. Where the base has no score, a stated floor stands
in. Every number has an interval; statistics are in `stats`. Pure Python and numpy; no model, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from temperament.errors import UserError
from temperament.run import words
from temperament.run.change import Change, Graded, changes_from_json, compare, mean_gain, plain, retained
from temperament.run.outcome import Outcome, Role, SkillResult, by_skill, set_level, status

__all__ = ["Change", "Graded", "Ledger", "Outcome", "SkillResult", "by_skill", "changes_from_json", "set_level"]


@dataclass(frozen=True)
class Ledger:
    """Rows in order, each {skill: SkillResult}; the first is where the run began, the last where it ended.

    A skill's items are the same in every row that has it. `learned` names the row in which a target was learned; by default the
    first row after the base whose result has the role "target".
    """

    rows: Mapping[str, Mapping[str, SkillResult]]
    learned: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.rows:
            raise UserError("ledger.rows", [], "give at least one row of measured skills")
        for skill in self.skills:
            seen: SkillResult | None = None
            for row, results in self.rows.items():
                if skill in results:
                    if seen is not None and [o.id for o in seen.outcomes] != [o.id for o in results[skill].outcomes]:
                        mend = "measure the same items, in the same order, in every row"
                        other = f"{len(results[skill].outcomes)} other items"
                        raise UserError(f"ledger row '{row}', skill '{skill}'", other, mend)
                    seen = results[skill]

    def add(self, name: str, results: Mapping[str, SkillResult]) -> Ledger:
        return replace(self, rows={**self.rows, name: results})

    @property
    def skills(self) -> list[str]:
        """Names in order of first appearance, targets first, then retained, then the rest."""
        names = list(dict.fromkeys(name for results in self.rows.values() for name in results))
        return sorted(names, key=lambda name: ("target", "retained", "other").index(self.role(name)))

    def role(self, skill: str) -> Role:
        roles = [results[skill].role for results in self.rows.values() if skill in results]
        return "target" if "target" in roles else roles[-1]

    def change(self, skill: str, before: str | None = None, after: str | None = None) -> Change:
        """Paired change of one skill between two rows (default: the first and the last). ValueError where neither has it."""
        names = list(self.rows)
        old = self.rows[before or names[0]].get(skill)
        new = self.rows[after or names[-1]].get(skill)
        if old is None and new is None:
            raise ValueError(f"skill {skill!r} is in neither row")
        return replace(compare(old, new), role=self.role(skill))

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        first, last = (list(self.rows)[i] for i in (0, -1))
        return tuple(self.change(s) for s in self.skills if s in self.rows[first] or s in self.rows[last])

    def items(self, skill: str, before: str | None = None, after: str | None = None) -> list[dict[str, Any]]:
        """One dict an item, both outputs side by side, for the report's browser and for `items.jsonl`."""
        names = list(self.rows)
        old = self.rows[before or names[0]].get(skill)
        new = self.rows[after or names[-1]].get(skill)
        out = []
        for shape in (new or old).outcomes if new or old else ():
            a, b = (r.by_id.get(shape.id) if r else None for r in (old, new))
            out.append(
                {
                    "id": shape.id,
                    "prompt": shape.prompt,
                    "expected": shape.expected,
                    "before": a.output if a else None,
                    "after": b.output if b else None,
                    "score_before": a.score if a else None,
                    "score_after": b.score if b else None,
                    "status": status(new or old, a, b),
                }
                | _pictures(a, b)
            )
        return out

    @cached_property
    def matrix(self) -> dict[str, Any]:
        """Skills by rows, and for targets learned one after the other (R[i, s]: skill s after row i, up meaning better):

        backward transfer   mean over earlier targets of R[last, s] - R[learned(s), s]
        forward transfer    mean over later targets of R[learned(s) - 1, s] - R[first, s]
        average             mean over targets of R[last, s];  retained: mean change from the first row to the last
        """
        names, skills = list(self.rows), self.skills
        learned = {s: row for s in skills if (row := self._learned(s)) is not None}
        value = {(row, s): r.mean for row, results in self.rows.items() for s, r in results.items()}
        back, forward, final = [], [], []
        for s, row in learned.items():
            at = names.index(row)
            if value.get((names[-1], s)) is None or self.rows[names[-1]][s].shown_unit != "points":
                continue
            final.append((s, value[names[-1], s]))
            if at < len(names) - 1:
                back.append(self.change(s, row, names[-1]))
            if at > 1 and s in self.rows[names[at - 1]] and s in self.rows[names[0]]:
                forward.append(self.change(s, names[0], names[at - 1]))
        return {
            "rows": names,
            "skills": skills,
            "roles": [self.role(s) for s in skills],
            "units": [next(r[s].shown_unit for r in self.rows.values() if s in r) for s in skills],
            "higher_is_better": [next(r[s].higher_is_better for r in self.rows.values() if s in r) for s in skills],
            "values": [[value.get((row, s)) for s in skills] for row in names],
            "learned": learned,
            "backward_transfer": mean_gain(back),
            "forward_transfer": mean_gain(forward),
            "average": float(np.mean([v for _, v in final])) if final else None,
        }

    def _learned(self, skill: str) -> str | None:
        names = list(self.rows)
        if skill in self.learned:
            return self.learned[skill]
        taught = [row for row in names[1:] if skill in self.rows[row] and self.rows[row][skill].role == "target"]
        steps = [row for row in taught if row != "inference"]  # (the base with the recipe's inference has learned nothing yet)
        return (steps or taught or [None])[0]

    @cached_property
    def retained(self) -> dict[str, Any] | None:
        return retained(self.changes)

    @property
    def verdict(self) -> str:
        return words.verdict(self.changes)

    def to_json(self, items: bool = False) -> dict[str, Any]:
        """The contract's `ledger` of run.json; with `items` also every outcome, which `from_json` needs."""
        out = {
            "skills": [c.to_json() for c in self.changes],
            "matrix": self.matrix,
            "retained": self.retained,
            "verdict": self.verdict,
        }
        if items:
            out["learned"] = dict(self.learned)
            out["rows"] = {row: {s: asdict(r) for s, r in results.items()} for row, results in self.rows.items()}
        return plain(out)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Ledger:
        if "rows" not in data:
            mend = "write it with to_json(items=True), or read its skills with changes_from_json"
            raise UserError("ledger", "a summary without rows", mend)
        rows = {row: {s: _result(r) for s, r in results.items()} for row, results in data["rows"].items()}
        return cls(rows, dict(data.get("learned", {})))


def _pictures(before: Outcome | None, after: Outcome | None) -> dict[str, str]:
    """`image`, of what was asked; or where each made its own, `image_before` and `image_after`."""
    a, b = (o.extra.get("image") if o else None for o in (before, after))
    named = {"image": a or b} if a == b or not (before and after) else {"image_before": a, "image_after": b}
    return {k: v for k, v in named.items() if v}


def _result(data: Mapping[str, Any]) -> SkillResult:
    outcomes = tuple(Outcome(**o) for o in data["outcomes"])
    tuples = {k: tuple(data[k]) if data.get(k) is not None else None for k in ("bounds", "floor")}
    return SkillResult(**{**data, **tuples, "outcomes": outcomes, "draws": tuple(data.get("draws", ()))})
