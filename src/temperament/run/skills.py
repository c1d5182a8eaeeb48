"""The skills of a run: what its suites measure, measured on whatever the base's modules are at the moment, and kept.

skills = skills_of(recipe, base)
results, cached = skills.measure(path, key, tell)       every item of every skill; from `path` where `key` says it is the same
skills.look(100)                                        means on a few items, while training
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from temperament import parts
from temperament.bases.load import Base
from temperament.engine.measure import System
from temperament.errors import UserError, nearest
from temperament.protocols import Outcome
from temperament.run import recipe as schema
from temperament.run.artefacts import address, cache_dir, prints, read_outcomes, write_outcomes
from temperament.run.ledger import Ledger
from temperament.run.outcome import SkillResult, set_level
from temperament.run.recipe import walk_steps
from temperament.run.training import quiet_training
from temperament.train.checkpoint import write_atomic

Tell = Callable[..., None]


@dataclass
class Skills:
    """The skills of a run, as suites gave them, and their scores."""

    skills: list[Any]
    recipe: schema.Recipe
    base: Base

    def __post_init__(self):
        seen: set[str] = set()
        for s in self.skills:
            if s.name in seen:
                raise UserError("evaluation.suites", s.name, "two suites bring a skill of this name; give one another `name`")
            seen.add(s.name)

    def alone(self) -> Skills:
        """The same skills without the recipe's inference parts: what the weights do on their own."""
        return Skills(self.skills, replace(self.recipe, inference=[]), self.base)

    def key(self, of: str) -> str:
        """Address of scores: who was measured, on what, how."""
        inference = list(self.recipe.inference)
        made = [parts.plain(inference), self.recipe.seed, *prints(inference)]
        return address("scores", of, [s.key() for s in self.skills], *made)

    def less(self) -> set[str]:
        """Skills of which less is better (nats); also "target", where that holds for the target skills."""
        less = {s.name for s in self.skills if not s.how.get("higher_is_better", True)}
        targets = {s.name for s in self.skills if s.role == "target"}
        return less | ({"target"} if targets and targets <= less else set())

    def system(self, model: Any = None, graded: bool = True) -> System:
        return System(self.base, self.recipe.inference, self.recipe.evaluation.batch, self.recipe.seed, graded, model)

    def measure(self, path: Path, key: str, tell: Tell, of: str = "") -> tuple[dict[str, SkillResult], bool]:
        """Scores of the base's modules as they stand; from the file if they were measured before. Second: were they? of: the
        address of the step in whose folder that file is."""
        outcomes = read_outcomes(path, key)
        cached = outcomes is not None
        if outcomes is None:
            outcomes, system = [], replace(self.system(), folder=path.parent, key=of)
            for i, skill in enumerate(self.skills):
                tell("measure", skill=skill.name, done=i, total=len(self.skills))
                outcomes += skill.measure(system)
            write_outcomes(path, key, outcomes)
        return self.results(outcomes), cached

    def results(self, outcomes: Iterable[Outcome]) -> dict[str, SkillResult]:
        by: dict[str, list[Outcome]] = {s.name: [] for s in self.skills}
        for o in outcomes:
            by[o.skill].append(o)
        return {s.name: _result(s, tuple(by[s.name])) for s in self.skills}

    def look(self, items: int, watched: Iterable[str] | None = None) -> dict[str, float]:
        """Means on a few items while training: each watched skill, and "target", the mean of the target skills."""
        for m in self.base.components.values():
            m.eval()
        wanted = [
            s for s in self.skills if watched is None or s.name in watched or (s.role == "target" and "target" in watched)
        ]
        values = {}
        for s in wanted:
            some = s.some(items) if items else s
            values[s.name] = level(some, some.measure(self.system(graded=False)))
        for m in self.base.components.values():
            quiet_training(m)
        targets = [values[s.name] for s in wanted if s.role == "target"]
        return values | ({"target": sum(targets) / len(targets)} if targets else {})


def level(skill: Any, outcomes: Sequence[Outcome]) -> float:
    """The one number of a skill, as the ledger will have it, without its interval; 0 where nothing has a score."""
    if hasattr(skill, "of_set") and len(outcomes) > 1:
        return float(skill.of_set(outcomes)(np.arange(len(outcomes))))
    scores = [o.score for o in outcomes if o.score is not None]
    return sum(scores) / max(len(scores), 1)


def _result(skill: Any, outcomes: tuple[Outcome, ...]) -> SkillResult:
    """A skill whose number belongs to the whole set of its items says how (`of_set`); all others are means over them."""
    how = {"distance": skill.distance, **skill.how}
    if hasattr(skill, "of_set") and len(outcomes) > 1:
        return set_level(skill.name, skill.role, skill.metric, outcomes, skill.of_set(outcomes), **how)
    return SkillResult(skill.name, skill.role, skill.metric, outcomes, **how)


class Book:
    """What was measured in a run, row by row, and which target was taught by which step."""

    def __init__(self, tell: Tell):
        self.rows: dict[str, dict[str, SkillResult]] = {}
        self.learned: dict[str, str] = {}  # target -> the row after which it was taught
        self.tell = tell

    def measure(self, row: str, skills: Skills, path: Path, of: str) -> None:
        """Measure the modules as they stand, whose address is `of`; kept at `path`."""
        self.rows[row], cached = skills.measure(path, skills.key(of), self.tell, of)
        self.tell("measured", row=row, results=self.rows[row], cached=cached)

    def ledger(self) -> Ledger | None:
        return Ledger(self.rows, {s: row for s, row in self.learned.items() if row in self.rows}) if self.rows else None

    def value(self, skill: str) -> float | None:
        """The newest mean of a skill, or of the targets."""
        newest = list(self.rows.values())[-1] if self.rows else {}
        picked = [r.mean for r in newest.values() if r.skill == skill or (skill == "target" and r.role == "target")]
        return sum(picked) / len(picked) if picked else None

    def holds(self, when: schema.Condition) -> bool:
        value = self.value(when.skill)
        if value is None:
            raise UserError("when.skill", when.skill, "it has not been measured before this step")
        return (when.below is None or value < when.below) and (when.above is None or value >= when.above)


@dataclass(frozen=True)
class Asking:
    """What a suite is given when it makes its skills."""

    base: Base
    items: int
    seed: int

    def constant(self, what: list[Any], make: Callable[[], Any]) -> Any:
        """A JSON value that follows from the base and from `what`: made once, ever, and kept in the user's cache."""
        path = cache_dir() / "constants" / f"{address('constant', self.base.sha256, self.base.reading, what)}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))["is"]
        except (OSError, ValueError, KeyError, TypeError):
            made = make()
        write_atomic(path, json.dumps({"what": what, "is": made}))
        return made


def skills_of(recipe: schema.Recipe, base: Base) -> Skills:
    """What a recipe measures: its suites, or what its sources hold out and what the base is meant to know; and the keep set."""
    spec = recipe.evaluation
    suites = list(spec.suites)
    if not suites:
        offered = [s for step in walk_steps(recipe.steps) if step.train for s in default_suites(step.train.source)]
        suites = list({address(parts.plain(s)): s for s in offered}.values()) + [parts.build(s) for s in base.suites]
    if spec.keep and base.keeps and not any(type(s).part_name == base.keeps for s in suites):
        suites.append(parts.build(base.keeps))
    ctx = Asking(base, spec.items, recipe.seed)
    made = [skill for suite in suites for skill in suite.skills(ctx)]
    targets = {s.name for s in made if s.role == "target"}
    made = [s for s in made if s.role == "target" or s.name not in targets]
    return Skills(
        list({(s.name, s.role, s.key()): s for s in reversed(made)}.values())[::-1], recipe, base
    )  # the same thing twice is once


def default_suites(source: Any) -> list[Any]:
    """What a source offers to be measured by: held-out rows of its own file. Sources say so themselves (`suites()`)."""
    return [parts.build(s) for s in source.suites()] if hasattr(source, "suites") else []


def taught_by(source: Any, skills: Skills) -> list[str]:
    """The targets a source teaches: those it offers to be measured by. With one target there is nothing to tell apart."""
    targets = {s.name for s in skills.skills if s.role == "target"}
    if len(targets) < 2:
        return []
    ctx = Asking(skills.base, 1, skills.recipe.seed)
    return sorted(targets & {s.name for suite in default_suites(source) for s in suite.skills(ctx)})


def check_watched(step: schema.Step, skills: Skills) -> None:
    """What a step watches must be measured, and "target" must be one kind of measure."""
    train, rounds = step.train, step.rounds
    chosen = "target" if train and train.keep == "best" else None
    watched = {
        f"{step.name}.train.stop.skill": train.stop.skill if train and train.stop else chosen,
        f"{step.name}.rounds.until.skill": rounds.until.skill if rounds and rounds.until else None,
        f"{step.name}.when.skill": step.when.skill if step.when else None,
    }
    targets, less = {s.name for s in skills.skills if s.role == "target"}, skills.less()
    known = {s.name for s in skills.skills} | ({"target"} if targets else set())
    for place, skill in watched.items():
        if skill is not None and skill not in known:
            raise UserError(place, skill, f"no suite measures it; {nearest(skill, known)}")
        if skill == "target" and targets & less and not targets <= less:
            mend = f"of {', '.join(sorted(targets & less))} less is better, of other targets more; name one skill"
            raise UserError(place, skill, mend)
