"""`temper tune`: a recipe carried out. Validate, plan, check exactness, measure the base, do the steps, ledger, dial, report.

    run = tune(recipe, "runs/first")
    run.ledger, run.delta, run.model

Each step starts from a `State` (the change so far) and leaves one; after each the ledger gets a row. Finished steps are taken from the
run folder by their key, so an interrupted or edited run does only what is new.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from json import dumps
from pathlib import Path
from typing import Any

from temperament import parts
from temperament.bases.load import Base, load
from temperament.delta import Delta
from temperament.engine.measure import System
from temperament.errors import Interrupted, TemperError, UserError, WorkFailed, nearest
from temperament.nn import draws
from temperament.protocols import Outcome
from temperament.run import recipe as schema
from temperament.run.artefacts import Folder, address, cache_dir, file_sha, made_of, read_outcomes, walk_all, write_outcomes
from temperament.run.ledger import Ledger
from temperament.run.memory import watch as peak_memory
from temperament.run.outcome import SkillResult
from temperament.run.recipe import unrolled, walk_steps
from temperament.run.state import State, chain, place_on
from temperament.run.training import quiet_training, run_train
from temperament.train.checkpoint import write_atomic
from temperament.train.context import Context
from temperament.train.world import World

Tell = Callable[..., None]


@dataclass
class Run:
    """What a recipe left. `json` is run.json."""

    folder: Path
    recipe: schema.Recipe
    base: Base
    state: State
    ledger: Ledger | None
    json: dict[str, Any] = field(default_factory=dict)

    @property
    def delta(self) -> Delta | None:
        return self.state.delta

    @property
    def model(self):
        """The tuned model: the base's modules with the whole change applied."""
        return place_on(self.base, self.state).model


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
        return address("scores", of, [s.key() for s in self.skills], parts.plain(list(self.recipe.inference)), self.recipe.seed)

    def less(self) -> set[str]:
        """Skills of which less is better (nats); also "target", where that holds for the target skills."""
        less = {s.name for s in self.skills if not s.how.get("higher_is_better", True)}
        targets = {s.name for s in self.skills if s.role == "target"}
        return less | ({"target"} if targets and targets <= less else set())

    def system(self, model: Any = None, graded: bool = True) -> System:
        return System(self.base, self.recipe.inference, self.recipe.evaluation.batch, self.recipe.seed, graded, model)

    def measure(self, path: Path, key: str, tell: Tell) -> tuple[dict[str, SkillResult], bool]:
        """Scores of the base's modules as they stand; from the file if they were measured before. Second: were they?"""
        outcomes = read_outcomes(path, key)
        cached = outcomes is not None
        if outcomes is None:
            outcomes, system = [], self.system()
            for i, skill in enumerate(self.skills):
                tell("measure", skill=skill.name, done=i, total=len(self.skills))
                outcomes += skill.measure(system)
            write_outcomes(path, key, outcomes)
        return self.results(outcomes), cached

    def results(self, outcomes: Iterable[Outcome]) -> dict[str, SkillResult]:
        by: dict[str, list[Outcome]] = {s.name: [] for s in self.skills}
        for o in outcomes:
            by[o.skill].append(o)
        return {s.name: SkillResult(s.name, s.role, s.metric, tuple(by[s.name]), distance=s.distance, **s.how) for s in self.skills}

    def look(self, live: Any, items: int, watched: Iterable[str] | None = None) -> dict[str, float]:
        """Means on a few items while training: each watched skill, and "target", the mean of the target skills."""
        for m in self.base.components.values():
            m.eval()
        wanted = [s for s in self.skills if watched is None or s.name in watched or (s.role == "target" and "target" in watched)]
        values = {}
        for s in wanted:
            some = s.some(items) if items else s
            scores = [o.score for o in some.measure(self.system(graded=False)) if o.score is not None]
            values[s.name] = sum(scores) / max(len(scores), 1)
        for m in self.base.components.values():
            quiet_training(m)
        targets = [values[s.name] for s in wanted if s.role == "target"]
        return values | ({"target": sum(targets) / len(targets)} if targets else {})


def tune(
    recipe: str | Path | Mapping[str, Any] | schema.Recipe,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    fresh: bool = False,
    overrides: Iterable[str] = (),
    base: Base | None = None,
    tell: Tell = lambda event, **data: None,
) -> Run:
    """Carry out a recipe in the folder `out`. A `base` already loaded (or an nn.Module as `Base`) may be given instead of its name."""
    recipe = schema.read(recipe, overrides)
    world = World(recipe.precision.compute, recipe.log_with, device=recipe.device)
    out = Path(out) if out is not None else Path("runs") / address(recipe.plain())[:12]
    folder = Folder(out, write=world.main)
    before = _opened(folder, world, resume, fresh)
    if resume and before and (stored := folder.path / "recipe.yaml").exists() and schema.read(stored).plain() != recipe.plain():
        tell("note", text="the recipe differs from the one this run began with; steps that changed are done anew")
    with folder.alone():
        return _Tuning(recipe, folder, world, base, tell).run()


def _opened(folder: Folder, world: World, resume: bool, fresh: bool) -> dict[str, Any]:
    """The main process opens the folder and the others hear what came of it: looking for themselves they would find what it has just written."""
    before, problem = {}, None
    if world.main:
        try:
            before = folder.open(resume, fresh)
        except TemperError as raised:
            problem = raised
    before, sentence, code = world.same((before, str(problem or ""), getattr(problem, "exit_code", 0)))
    if sentence:
        raise problem or (UserError("--out", str(folder.path), "the main process refused it") if code == 2 else WorkFailed(sentence))
    return before


class _Tuning:
    def __init__(self, recipe: schema.Recipe, folder: Folder, world: World, base: Base | None, tell: Tell):
        self.recipe, self.folder, self.world, self.tell = recipe, folder, world, tell
        self.began = time.time()
        self.json: dict[str, Any] = {"status": "running", "recipe": recipe.plain(), "steps": [], "environment": environment()}
        self.base = base
        self.rows: dict[str, dict[str, SkillResult]] = {}
        self.states: dict[str, State] = {}
        self.learned: dict[str, str] = {}  # target -> the row after which it was taught
        self.latest: dict[str, str] = {}  # a step's name inside its rounds -> the whole name of the last one done
        self.cost = {"seconds": 0.0, "peak_bytes": 0, "tokens": 0}

    def run(self) -> Run:
        folder, recipe = self.folder, self.recipe
        if folder.write:
            write_atomic(folder.path / "recipe.yaml", recipe.yaml())
        try:
            self.prepare()
            state = State(address("base", self.base.sha256))
            self.states["base"] = state
            if recipe.evaluation.base and self.skills.skills:
                self.measure_base()
            for step in recipe.steps:
                state = self.do(step, state)
            return self.end(state)
        except Interrupted as problem:
            self.close("interrupted", str(problem))
            raise
        except KeyboardInterrupt:
            self.close("interrupted", "interrupted")
            raise Interrupted("Interrupted; finished steps and the last checkpoint are kept. Go on with --resume.") from None
        except TemperError as problem:
            self.close("failed", str(problem))
            raise
        except Exception as problem:
            self.close("failed", repr(problem))
            raise
        finally:
            if self.base is not None:
                self.base.reset()

    def close(self, status: str, why: str) -> None:
        self.json |= {"status": status, "error": why}
        try:
            self.folder.save_run(self.json)
        except WorkFailed:
            pass  # a full disk is what is being reported

    # -- before the steps -----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        recipe = self.recipe
        if self.base is None:
            self.tell("phase", name="load", text=recipe.base)
            device = self.world.device if recipe.device == "auto" else recipe.device
            self.base = load(recipe.base, dtype=recipe.precision.master, device=device, trust_remote_code=recipe.trust_remote_code)
        self.json["base"] = {"id": recipe.base, "sha256": dict(self.base.sha256)}
        self.folder.save_run(self.json)
        self.skills = skills_of(recipe, self.base)
        for step in walk_steps(recipe.steps):
            self.check_watched(step)
        if any(step.train for step in walk_steps(recipe.steps)):
            from temperament.run.plan import plan

            self.json["plan"] = plan(recipe, self.base)
            self.tell("plan", plan=self.json["plan"])
            if recipe.check:
                from temperament.run.check import check

                self.tell("phase", name="check", text="exactness on your model and data")
                self.json["check"] = check(recipe, self.base, self.world)
                self.tell("check", check=self.json["check"])

    def check_watched(self, step: schema.Step) -> None:
        """What a step watches must be measured, and "target" must be one kind of measure."""
        train, rounds = step.train, step.rounds
        watched = {f"{step.name}.train.stop.skill": train.stop.skill if train and train.stop else "target" if train and train.keep == "best" else None,
                   f"{step.name}.rounds.until.skill": rounds.until.skill if rounds and rounds.until else None,
                   f"{step.name}.when.skill": step.when.skill if step.when else None}  # fmt: skip
        targets, less = {s.name for s in self.skills.skills if s.role == "target"}, self.skills.less()
        known = {s.name for s in self.skills.skills} | ({"target"} if targets else set())
        for place, skill in watched.items():
            if skill is not None and skill not in known:
                raise UserError(place, skill, f"no suite measures it; {nearest(skill, known)}")
            if skill == "target" and targets & less and not targets <= less:
                raise UserError(place, skill, f"of {', '.join(sorted(targets & less))} less is better, of other targets more; name one skill")

    def measure_base(self) -> None:
        """The base on its own; and with the recipe's inference parts, where it has some."""
        self.tell("phase", name="base", text="measuring the base")
        for row, skills in (("base", self.skills.alone()), *([("inference", self.skills)] if self.recipe.inference else [])):
            key = skills.key(address(self.base.sha256))
            results, cached = skills.measure(cache_dir() / "scores" / f"{key}.json", key, self.tell)
            self.rows[row] = results
            self.tell("measured", row=row, results=results, cached=cached)

    # -- the steps --------------------------------------------------------------------------------------------------------------

    def do(self, step: schema.Step, state: State, round: int = 0) -> State:
        """One step: from where it starts to the state it leaves."""
        start = state if step.start == "previous" else self.state_of(step)
        if step.when and not self.holds(step.when):
            self.states[step.name] = start
            self.tell("skip", name=step.name)
            return start
        if step.rounds:
            return self.rounds(step, start, round)
        if step.foreach:
            for inner in unrolled(step):
                start = self.do(inner, start, round)
            self.states[step.name] = start
            return start
        self.tell("phase", name=step.name, text=step.kind)
        spec = getattr(step, step.kind)
        made = made_of(spec) if not isinstance(spec, bool) else []
        key = address(step.kind, made, start.key, self.recipe.seed, round, self.inputs(step, spec))
        artefact = self.folder.finished(step.name, key)
        before = time.perf_counter()
        done = getattr(self, f"do_{step.kind}")(step, spec, start, key, round, artefact)
        self.states[step.name] = done
        seconds = artefact["seconds"] if artefact else time.perf_counter() - before
        entry = {"name": step.name, "kind": step.kind, "key": key, "cached": artefact is not None, "seconds": seconds}
        self.json["steps"].append(entry | self.left(step.name))
        self.tell("done", name=step.name, cached=artefact is not None, seconds=seconds)
        if step.ledger and self.skills.skills and step.kind != "build":
            self.measure_after(step.name, done)
            if step.merge:
                self.json["steps"][-1]["synergy"] = self.synergy(step)
        self.folder.save_run(self.json | {"status": "running", "ledger": self.ledger_json()})
        return done

    def state_of(self, step: schema.Step) -> State:
        """The state of the step that `start` names."""
        known = self.scope(step.name)
        if step.start not in known:
            raise UserError(f"{step.name}.start", step.start, f"not a step before this one; {nearest(step.start, known)}")
        return known[step.start]

    def left(self, name: str) -> dict[str, Any]:
        artefact = self.last_artefact.get(name, {})
        return {k: artefact[k] for k in ("steps", "tokens", "stopped", "rows") if k in artefact}

    last_artefact: dict[str, dict] = {}

    def inputs(self, step: schema.Step, spec: Any) -> list[Any]:
        """Addresses of what else a step reads: other artefacts, and of the recipe around it what can change its result."""
        known = self.scope(step.name)
        if step.merge:
            return [known[n].key if n in known else file_sha(n) for n in self.merged(spec, known)]
        read = [n for p in walk_all(spec) for n in getattr(p, "inputs", ())]
        for name in read:
            if name not in known:
                raise UserError(step.name, name, f"a part reads this step, and none before it is called so; {nearest(name, known)}")
        keys = [known[n].key for n in read] + [s.key for s in self.states.values() if s.data]
        if step.build:
            return [keys, parts.plain([self.recipe.inference, self.recipe.aides])]
        if step.train:
            looked = spec.stop or spec.keep == "best"
            return [keys, self.recipe.precision.compute, self.skills.key("look") if looked else "", self.recipe.evaluation.every if spec.keep == "best" else 0]
        return keys

    def scope(self, name: str) -> dict[str, State]:
        """The steps a step can name: all before it, and what rounds have done without their number - the last one of that name."""
        return self.states | {short: self.states[whole] for short, whole in self.latest.items()}

    def merged(self, spec: schema.Merging, known: Mapping[str, State]) -> list[str]:
        """What a merge merges: by default the result of every step before that changed the base, each once."""
        changed = {s.key: n for n, s in reversed(self.states.items()) if s.delta is not None and "/" not in n}
        return spec.of or list(reversed(changed.values()))

    def do_train(self, step: schema.Step, spec: schema.Train, start: State, key: str, round: int, artefact: dict | None) -> State:
        place = self.folder.step(step.name)
        if artefact:
            self.last_artefact = {**self.last_artefact, step.name: artefact}
            self.cost["tokens"] += artefact.get("tokens", 0)
            self.cost["seconds"] += artefact.get("seconds", 0.0)
            self.learn(step, spec)
            return State(key, Delta.load(place / "delta"), place, start.data, start.stage + 1)
        place_on(self.base, start)
        # Every stage has draws of its own: order, halves, first values, samples.
        seed = self.recipe.seed if start.stage == round == 0 else draws.key(self.recipe.seed, "stage", start.stage, round) & 0x7FFFFFFF
        ctx = Context(self.base, self.world, seed, spec.batch, spec.micro, place / "scratch", key, round=round,
                      aides=self.recipe.aides, inference=self.recipe.inference, artefacts=self.artefacts(start, step.name),
                      before=self.before(step, start), tell=self.tell)  # fmt: skip
        watched = [spec.stop.skill] if spec.stop else None
        peak = peak_memory()
        trained = run_train(spec, ctx, self.folder, step.name, key, lambda live, items: self.skills.look(live, items, watched if items else None), self.tell, self.recipe.evaluation.every, self.skills.less())
        whole = chain(self.base, start.delta, trained.delta)
        if self.folder.write:
            whole.save(place / "delta", overwrite=True)
        self.cost["tokens"] += trained.tokens
        self.cost["seconds"] += trained.seconds
        self.cost["peak_bytes"] = max(self.cost["peak_bytes"], peak())
        content = {"steps": trained.steps, "tokens": trained.tokens, "seconds": trained.seconds, "stopped": trained.stopped, "digest": whole.digest}
        self.last_artefact = {**self.last_artefact, step.name: self.folder.finish(step.name, key, kind="train", **content)}
        self.learn(step, spec)
        return State(key, whole, place, start.data, start.stage + 1)

    def learn(self, step: schema.Step, spec: schema.Train) -> None:
        """Note which targets this step taught: those its own source offers to be measured by."""
        targets = {s.name for s in self.skills.skills if s.role == "target"}
        ctx = Asking(self.base, 1, self.recipe.seed)
        offered = {s.name for suite in default_suites(spec.source) for s in suite.skills(ctx)} if len(targets) > 1 else set()
        self.learned |= dict.fromkeys(sorted(targets & offered), step.name)

    def measure_sources(self, step: schema.Step, deltas: Mapping[str, Delta]) -> None:
        """A row of the ledger for each source of a merge that has none: runs, adapters and folders that are no steps of this recipe."""
        if step.ledger and self.skills.skills:
            for name, delta in deltas.items():
                self.measure_after(name, State(address("source", file_sha(name)), delta))

    def synergy(self, step: schema.Step) -> dict[str, Any]:
        """What the merge has that its sources have not, of the skills all were measured in."""
        from temperament.run.synergy import synergy

        names = self.merged(step.merge, self.scope(step.name))
        sources = [self.rows[n] for n in names if n in self.rows and n != step.name]
        return synergy(self.rows[step.name], sources)

    def do_merge(self, step: schema.Step, spec: schema.Merging, start: State, key: str, round: int, artefact: dict | None) -> State:
        place = self.folder.step(step.name)
        self.base.reset()
        known = self.scope(step.name)
        names = self.merged(spec, known)
        deltas = [known[n].delta if n in known else read_delta(n, self.base) for n in names]
        if not deltas or any(d is None for d in deltas):
            raise UserError(f"{step.name}.merge.of", names, "each must have changed the base; name train steps, runs or adapters")
        self.measure_sources(step, {n: d for n, d in zip(names, deltas, strict=True) if n not in known})
        if artefact:
            return State(key, Delta.load(place / "delta"), place, start.data)
        began = time.perf_counter()
        self.base.reset()
        tried = {}
        if hasattr(spec.method, "search"):  # it looks at development items
            from temperament.run.scoring import scorer

            merged, tried = spec.method.search(self.base, deltas, scorer(self.recipe, self.base, self.recipe.evaluation.items))
        else:
            merged = spec.method.merge(self.base, deltas)
        if self.folder.write:
            merged.save(place / "delta", overwrite=True)
        self.folder.finish(step.name, key, kind="merge", digest=merged.digest, seconds=time.perf_counter() - began, tried=tried)
        return State(key, merged, place, start.data)

    def do_measure(self, step: schema.Step, spec: bool, start: State, key: str, round: int, artefact: dict | None) -> State:
        return start

    def do_build(self, step: schema.Step, spec: schema.Building, start: State, key: str, round: int, artefact: dict | None) -> State:
        import json

        place = self.folder.step(step.name)
        data = {**start.data, step.name: str(place / "data.jsonl")}
        if artefact:
            self.last_artefact = {**self.last_artefact, step.name: artefact}
            return replace(start, key=key, data=data)
        began = time.perf_counter()
        place_on(self.base, start)
        ctx = Context(self.base, self.world, self.recipe.seed, round=round, aides=self.recipe.aides, inference=self.recipe.inference,
                      artefacts=self.artefacts(start, step.name), before=self.before(step, start), tell=self.tell)  # fmt: skip
        items, rejected = [], []
        for item in spec.builder.make(ctx):
            (rejected if isinstance(item, dict) and "rejected_because" in item else items).append(item)
            if spec.limit and len(items) >= spec.limit:
                break
        if self.folder.write:
            write_atomic(place / "data.jsonl", "".join(json.dumps(i) + "\n" for i in items))
            write_atomic(place / "rejected.jsonl", "".join(json.dumps(i) + "\n" for i in rejected))
        content = {"rows": len(items), "rejected": len(rejected), "seconds": time.perf_counter() - began}
        self.last_artefact = {**self.last_artefact, step.name: self.folder.finish(step.name, key, kind="build", **content)}
        return replace(start, key=key, data=data)

    def rounds(self, step: schema.Step, start: State, outer: int = 0) -> State:
        state, spec = start, step.rounds
        last = self.value(spec.until.skill) if spec.until else None  # what the first round is compared with
        for i in range(spec.times):
            begin = {"previous": state, "base": self.states["base"], "start": start}[spec.start]
            state = replace(begin, data=state.data)
            for inner in spec.steps:
                state = self.do(replace(inner, name=f"{step.name}/{i + 1}/{inner.name}"), state, outer * spec.times + i)
                self.latest[inner.name] = f"{step.name}/{i + 1}/{inner.name}"
            self.states[step.name] = state
            value = self.value(spec.until.skill) if spec.until else None
            if value is not None:
                sign = -1 if spec.until.skill in self.skills.less() else 1
                if spec.until.above is not None and sign * value >= sign * spec.until.above:
                    break
                if spec.until.gains_less is not None and last is not None and sign * (value - last) < spec.until.gains_less:
                    break
                last = value
        return state

    def artefacts(self, state: State, step: str) -> dict[str, Path]:
        """What earlier steps left, by the names this step can use: folders of changes, files of rows."""
        rows = {n: Path(p) for n, p in state.data.items()}
        return {n: s.folder for n, s in self.scope(step).items() if s.folder} | {s: rows[n] for s, n in self.latest.items() if n in rows} | rows

    def before(self, step: schema.Step, state: State) -> Path | None:
        """What this same step left in the round before."""
        return self.artefacts(state, "").get(self.latest.get(step.name.rpartition("/")[2], "")) if "/" in step.name else None

    # -- the ledger -------------------------------------------------------------------------------------------------------------

    def measure_after(self, name: str, state: State) -> None:
        place_on(self.base, state)
        results, cached = self.skills.measure(self.folder.step(name) / "outcomes.json", self.skills.key(state.key), self.tell)
        self.rows[name] = results
        self.tell("measured", row=name, results=results, cached=cached)

    def ledger(self) -> Ledger | None:
        return Ledger(self.rows, {s: row for s, row in self.learned.items() if row in self.rows}) if self.rows else None

    def ledger_json(self) -> dict[str, Any] | None:
        return self.ledger().to_json() if self.rows else None

    def value(self, skill: str) -> float | None:
        results = list(self.rows.values())[-1] if self.rows else {}
        picked = [r.mean for r in results.values() if r.skill == skill or (skill == "target" and r.role == "target")]
        return sum(picked) / len(picked) if picked else None

    def holds(self, when: schema.Condition) -> bool:
        value = self.value(when.skill)
        if value is None:
            raise UserError("when.skill", when.skill, "it has not been measured before this step")
        return (when.below is None or value < when.below) and (when.above is None or value >= when.above)

    # -- the end ------------------------------------------------------------------------------------------------------------------

    def end(self, state: State) -> Run:
        spec, json = self.recipe.evaluation, self.json
        json["ledger"] = self.ledger_json()
        if state.delta is not None:
            json["delta"] = {"parameters": state.delta.parameters, "bytes": state.delta.bytes, "digest": state.delta.digest}
            if self.folder.write:
                from temperament.run.export import save_delta

                json["delta"]["files"] = save_delta(state.delta, self.base, self.folder.path / "delta", self.recipe.base)
            self.base.reset()
            json["diagnoses"] = {name: self.diagnose(name, state.delta) for name in spec.diagnose}
            json["weights"] = weights(self.base, state.delta, json["diagnoses"])
            if spec.dial:
                from temperament.run.dial import dial

                self.tell("phase", name="dial", text="sweeping the strength of the change")
                json["dial"] = dial(self.skills, state.delta, spec.dial, self.tell)
        if self.folder.write and self.rows:
            items = {skill: self.ledger().items(skill) for skill in self.ledger().skills}
            write_atomic(self.folder.path / "items.json", dumps(items))
        self.cost["wall_seconds"] = time.time() - self.began
        json |= {"status": "done", "cost": self.cost}
        self.folder.save_run(json)
        run = Run(self.folder.path, self.recipe, self.base, state, self.ledger(), json)
        self.tell("end", run=run)
        return run

    def diagnose(self, name: str, delta: Delta) -> dict[str, Any]:
        from temperament.protocols import Diagnosis

        return parts.build(name, Diagnosis, "evaluation.diagnose").diagnose(Subject(self.base, delta))


def weights(base: Base, delta: Delta, diagnoses: Mapping[str, Any]) -> dict[str, Any]:
    """What changed, by layer and kind of matrix: |W' - W| / |W|, with the effective rank and intruders where they were diagnosed."""
    import torch

    known = {r["place"]: r for d in diagnoses.values() for r in d.get("rows", ()) if "place" in r}
    parameters, places, cells = dict(base.parameters()), base.places.parameters(), []
    with torch.no_grad():
        for name, change in delta.items():
            place, which = places[name]
            if which != "weight":
                continue
            W = base.originals.get(name, parameters[name].detach())
            row = known.get(place.name, {})
            relative = row.get("relative_norm", float(change.norm(W.float() if change.needs_weight else None) / W.float().norm().clamp(min=1e-30)))
            cells.append({"layer": base.places.depth_of(name).number, "kind": place.role, "place": place.name, "relative": relative,
                          "rank": row.get("effective_rank"), "intruders": row.get("count")})  # fmt: skip
    return {"cells": cells}


@dataclass(frozen=True)
class Subject:
    """What a diagnosis reads: a base and the change made on it; `runs` and `models` where several are compared."""

    base: Base
    delta: Delta | None = None
    runs: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Asking:
    """What a suite is given when it makes its skills."""

    base: Base
    items: int
    seed: int


def skills_of(recipe: schema.Recipe, base: Base) -> Skills:
    """What a recipe measures: its suites, or what its sources hold out and what the base is meant to know; and the keep set."""
    spec = recipe.evaluation
    suites = list(spec.suites)
    if not suites:
        offered = [s for step in walk_steps(recipe.steps) if step.train for s in default_suites(step.train.source)]
        suites = list({address(parts.plain(s)): s for s in offered}.values()) + [parts.build(s) for s in base.suites]
    if spec.keep and base.tokenizer is not None and not any(type(s).part_name == "evaluate.keep" for s in suites):
        suites.append(parts.build("evaluate.keep"))
    ctx = Asking(base, spec.items, recipe.seed)
    made = [skill for suite in suites for skill in suite.skills(ctx)]
    targets = {s.name for s in made if s.role == "target"}
    made = [s for s in made if s.role == "target" or s.name not in targets]
    return Skills(list({(s.name, s.role, s.key()): s for s in reversed(made)}.values())[::-1], recipe, base)  # the same thing twice is once


def default_suites(source: Any) -> list[Any]:
    """What a source offers to be measured by: held-out rows of its own file. Sources say so themselves (`suites()`)."""
    return [parts.build(s) for s in source.suites()] if hasattr(source, "suites") else []


def read_delta(source: str, base: Base) -> Delta:
    """The delta of a run, an adapter folder, a delta folder, or a tuned model folder against this base."""
    from temperament.run.export import delta_of

    return delta_of(source, base)


def environment() -> dict[str, Any]:
    import importlib.metadata as metadata

    import torch

    versions = {p: metadata.version(p) for p in ("torch", "transformers", "accelerate", "safetensors", "numpy")}
    return {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system(), "threads": torch.get_num_threads(),
            "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None, **versions}  # fmt: skip
