"""The steps of a recipe, one after another: each takes the state it starts from and leaves one, and the ledger gets a row.

    steps = Steps(recipe, base, skills, folder, world, tell, after)
    state = steps.do(step, state)
    steps.states   what each step left, by name         steps.book   what was measured after each

A kind of step is a method `do_KIND(job)` that carries it out and gives the change it made and what its artefact tells.
Finished steps are taken from the run folder by their key, so an interrupted or edited run does only what is new."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from temperament import parts
from temperament.bases.load import Base
from temperament.delta import Delta
from temperament.engine.record import SCRATCH
from temperament.errors import UserError, nearest
from temperament.nn import draws
from temperament.run import recipe as schema
from temperament.run.artefacts import Folder, address, file_sha, made_of, prints, walk_all
from temperament.run.memory import watch as peak_memory
from temperament.run.recipe import unrolled
from temperament.run.skills import Book, Skills, Tell, taught_by
from temperament.run.state import State, chain, place_on
from temperament.run.synergy import synergy
from temperament.run.training import run_train
from temperament.train.checkpoint import write_atomic
from temperament.train.context import Context
from temperament.train.world import World

After = Callable[["Steps"], None]


@dataclass(frozen=True)
class Job:
    """One step as it is being done."""

    step: schema.Step
    spec: Any  # what `train`, `merge`, `build` or `measure` says
    start: State
    key: str
    round: int
    place: Path  # its folder


class Steps:
    def __init__(
        self, recipe: schema.Recipe, base: Base, skills: Skills, folder: Folder, world: World, tell: Tell, after: After
    ):
        self.recipe, self.base, self.skills, self.folder, self.world, self.tell = recipe, base, skills, folder, world, tell
        self.after = after  # each step
        self.states = {"base": State(address("base", base.sha256, base.reading))}
        self.latest: dict[str, str] = {}  # a step's name inside its rounds or foreach -> the whole name of the last one done
        self.book = Book(tell)
        self.done: list[dict[str, Any]] = []  # an entry for run.json of each
        self.cost = {"seconds": 0.0, "peak_bytes": 0, "tokens": 0}

    def do(self, step: schema.Step, state: State, round: int = 0) -> State:
        """One step, or what it consists of: from where it starts to the state it leaves."""
        start = state if step.start == "previous" else replace(self.state_of(step), data=state.data)  # rows stay readable
        if step.when and not self.book.holds(step.when):
            self.tell("skip", name=step.name)
        elif step.rounds:
            start = self.rounds(step, start, round)
        elif step.foreach:
            for inner in unrolled(step):
                start = self.do(inner, start, round)
                self.latest[inner.name.removeprefix(f"{step.name}.").partition(".")[2]] = inner.name
        else:
            start = self.one(step, start, round)
        self.states[step.name] = start
        return start

    def one(self, step: schema.Step, start: State, round: int) -> State:
        self.tell("phase", name=step.name, text=step.kind)
        spec = getattr(step, step.kind)
        made = made_of(spec) if not isinstance(spec, bool) else []
        key = address(step.kind, made, start.key, self.recipe.seed, round, self.inputs(step, spec))
        job = Job(step, spec, start, key, round, self.folder.step(step.name))
        artefact, began, change = self.folder.finished(step.name, key), time.perf_counter(), None
        cached = artefact is not None
        if not cached:
            change, content = getattr(self, f"do_{step.kind}")(job)
            content = {"seconds": time.perf_counter() - began} | content
            artefact = self.folder.finish(step.name, key, kind=step.kind, **content)
        self.world.wait()  # what the main process wrote, the others read
        state = self.left(job, change)
        self.cost["tokens"] += artefact.get("tokens", 0)
        self.cost["seconds"] += artefact["seconds"]
        told = {k: artefact[k] for k in ("steps", "tokens", "stopped", "rows") if k in artefact}
        self.done.append(
            {"name": step.name, "kind": step.kind, "key": key, "cached": cached, "seconds": artefact["seconds"], **told}
        )
        self.tell("done", name=step.name, cached=cached, seconds=artefact["seconds"])
        if step.train:
            self.book.learned |= dict.fromkeys(taught_by(spec.source, self.skills), step.name)
        if step.ledger and self.skills.skills and step.kind != "build":
            sources = self.measure_sources(job) if step.merge else []
            place_on(self.base, state)
            self.book.measure(step.name, self.skills, job.place / "outcomes.json", state.key)
            if step.merge:
                rows = self.book.rows
                self.done[-1]["synergy"] = synergy(rows[step.name], [rows[n] for n in sources if n in rows])
        self.after(self)
        return state

    def left(self, job: Job, change: Delta | None) -> State:
        """The state after a step; its change is read back where the step was done before."""
        start, name = job.start, job.step.name
        if job.step.measure:
            return start
        if job.step.build:
            return replace(start, key=job.key, data={**start.data, name: str(job.place / "data.jsonl")})
        known = self.scope(name)
        under = [start] if job.step.train else [known[n] for n in self.merged(job.spec, known) if n in known]
        stage = 1 + max((s.stage for s in under), default=0)
        return State(job.key, change if change is not None else Delta.load(job.place / "delta"), job.place, start.data, stage)

    # -- the kinds ---------------------------------------------------------------------------------------------------------

    def do_measure(self, job: Job) -> tuple[None, dict[str, Any]]:
        return None, {}

    def do_train(self, job: Job) -> tuple[Delta, dict[str, Any]]:
        spec, start, name = job.spec, job.start, job.step.name
        place_on(self.base, start)
        # Every stage has draws of its own: order, halves, first values, samples.
        first = start.stage == job.round == 0
        seed = self.recipe.seed if first else draws.key(self.recipe.seed, "stage", start.stage, job.round) & 0x7FFFFFFF
        ctx = replace(
            self.context(job), seed=seed, batch=spec.batch, micro=spec.micro, folder=job.place / SCRATCH, key=job.key
        )
        watched = [spec.stop.skill] if spec.stop else None
        look = lambda live, items: self.skills.look(items, watched if items else None)
        peak = peak_memory()
        every, less = self.recipe.evaluation.every, self.skills.less()
        trained = run_train(spec, ctx, self.folder, name, job.key, look, self.tell, every, less)
        self.cost["peak_bytes"] = max(self.cost["peak_bytes"], peak())
        whole = self.keep(job, chain(self.base, start.delta, trained.delta))
        told = {"steps": trained.steps, "tokens": trained.tokens, "seconds": trained.seconds, "stopped": trained.stopped}
        return whole, told | {"digest": whole.digest}

    def do_merge(self, job: Job) -> tuple[Delta, dict[str, Any]]:
        method, tried, deltas = job.spec.method, {}, list(self.sources(job).values())
        self.base.reset()
        if hasattr(method, "search"):  # it looks at development items
            from temperament.run.scoring import scorer

            merged, tried = method.search(self.base, deltas, scorer(self.recipe, self.base, self.recipe.evaluation.items))
        else:
            merged = method.merge(self.base, deltas)
        return self.keep(job, merged), {"digest": merged.digest, "tried": tried}

    def sources(self, job: Job) -> dict[str, Delta]:
        """What a merge merges, by name: steps of this recipe; runs, adapters and folders."""
        from temperament.run.export import delta_of

        self.base.reset()
        known = self.scope(job.step.name)
        names = self.merged(job.spec, known)
        found = {n: known[n].delta if n in known else delta_of(n, self.base) for n in names}
        if not found or any(d is None for d in found.values()):
            mend = "each must have changed the base; name train steps, runs or adapters"
            raise UserError(f"{job.step.name}.merge.of", names, mend)
        return found

    def measure_sources(self, job: Job) -> list[str]:
        """A row of the ledger for each source of a merge that has none, as it is no step of this recipe; the names of all."""
        sources, known = self.sources(job), self.scope(job.step.name)
        for name, delta in sources.items():
            if name not in known:
                key = address("source", file_sha(name))
                place_on(self.base, State(key, delta))
                self.book.measure(name, self.skills, self.folder.step(name) / "outcomes.json", key)
        return list(sources)

    def do_build(self, job: Job) -> tuple[None, dict[str, Any]]:
        place_on(self.base, job.start)
        items, rejected = [], []
        for item in job.spec.builder.make(self.context(job)):
            (rejected if isinstance(item, dict) and "rejected_because" in item else items).append(item)
            if job.spec.limit and len(items) >= job.spec.limit:
                break
        if self.folder.write:
            for name, rows in (("data", items), ("rejected", rejected)):
                write_atomic(job.place / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return None, {"rows": len(items), "rejected": len(rejected)}

    def keep(self, job: Job, delta: Delta) -> Delta:
        if self.folder.write:
            delta.save(job.place / "delta", overwrite=True)
        return delta

    def context(self, job: Job) -> Context:
        """What the parts of a step are told."""
        left, name = self.artefacts(job.start, job.step.name), job.step.name
        before = self.artefacts(job.start, "").get(self.latest.get(name.rpartition("/")[2], "")) if "/" in name else None
        return Context(self.base, self.world, self.recipe.seed, round=job.round, aides=self.recipe.aides,
                       inference=self.recipe.inference, artefacts=left, before=before, tell=self.tell)  # fmt: skip

    # -- rounds ------------------------------------------------------------------------------------------------------------

    def rounds(self, step: schema.Step, start: State, outer: int = 0) -> State:
        state, spec = start, step.rounds
        last = self.book.value(spec.until.skill) if spec.until else None  # what the first round is compared with
        for i in range(spec.times):
            begin = {"previous": state, "base": self.states["base"], "start": start}[spec.start]
            state = replace(begin, data=state.data)
            for inner in spec.steps:
                state = self.do(replace(inner, name=f"{step.name}/{i + 1}/{inner.name}"), state, outer * spec.times + i)
                self.latest[inner.name] = f"{step.name}/{i + 1}/{inner.name}"
            self.states[step.name] = state
            value = self.book.value(spec.until.skill) if spec.until else None
            if value is not None:
                sign = -1 if spec.until.skill in self.skills.less() else 1
                if spec.until.above is not None and sign * value >= sign * spec.until.above:
                    break
                if spec.until.gains_less is not None and last is not None and sign * (value - last) < spec.until.gains_less:
                    break
                last = value
        return state

    # -- what a step can name ----------------------------------------------------------------------------------------------

    def scope(self, name: str) -> dict[str, State]:
        """The steps a step can name: all before it, and what rounds and foreach have done, without their number: the last
        one."""
        return {short: self.states[whole] for short, whole in self.latest.items()} | self.states

    def state_of(self, step: schema.Step) -> State:
        """The state of the step that `start` names."""
        known = self.scope(step.name)
        if step.start not in known:
            raise UserError(f"{step.name}.start", step.start, f"not a step before this one; {nearest(step.start, known)}")
        return known[step.start]

    def merged(self, spec: schema.Merging, known: Mapping[str, State]) -> list[str]:
        """What a merge merges: by default the result of every step before that changed the base, each once."""
        changed = {s.key: n for n, s in reversed(self.states.items()) if s.delta is not None and "/" not in n}
        return spec.of or list(reversed(changed.values()))

    def inputs(self, step: schema.Step, spec: Any) -> list[Any]:
        """Addresses of what else a step reads: other artefacts, and of the recipe around it what can change its result."""
        known = self.scope(step.name)
        if step.merge:
            scored = self.skills.key("search") if hasattr(spec.method, "search") else ""
            return [scored] * bool(scored) + [known[n].key if n in known else file_sha(n) for n in self.merged(spec, known)]
        read = [n for p in walk_all(spec) for n in getattr(p, "inputs", ())]
        for name in read:
            if name not in known:
                raise UserError(
                    step.name, name, f"a part reads this step, and none before it is called so; {nearest(name, known)}"
                )
        keys = [known[n].key for n in read] + [s.key for s in self.states.values() if s.data]
        around = [self.recipe.inference, self.recipe.aides]  # its parts are told of both
        if step.build:
            return [keys, parts.plain(around), *prints(around)]
        if step.train:
            best = spec.keep == "best"
            looked = self.skills.key("look") if spec.stop or best else ""
            every = self.recipe.evaluation.every if best else 0
            return [keys, self.recipe.precision.compute, looked, every, *([made_of(around)] if any(around) else [])]
        return keys

    def artefacts(self, state: State, step: str) -> dict[str, Path]:
        """What earlier steps left, by the names this step can use: folders of changes, files of rows."""
        rows = {n: Path(p) for n, p in state.data.items()}
        folders = {n: s.folder for n, s in self.scope(step).items() if s.folder}
        return folders | {s: rows[n] for s, n in self.latest.items() if n in rows} | rows
