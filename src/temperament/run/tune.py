"""`temper tune`: a recipe carried out. Validate, plan, check exactness, measure the base, do the steps, ledger, dial, report.

    run = tune(recipe, "runs/first")
    run.ledger, run.delta, run.model

The steps themselves are in `steps`, what is measured and when in `skills`; here is what comes before them and after them.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from json import dumps
from pathlib import Path
from typing import Any

from temperament.bases.load import Base, load
from temperament.delta import Delta
from temperament.errors import Interrupted, TemperError, UserError, WorkFailed
from temperament.run import recipe as schema
from temperament.run.artefacts import Folder, address, cache_dir, walk_all
from temperament.run.diagnose import Subject, weights
from temperament.run.ledger import Ledger
from temperament.run.recipe import walk_steps
from temperament.run.skills import Tell, check_watched, skills_of
from temperament.run.state import State, place_on
from temperament.run.steps import Steps
from temperament.run.track import tracked
from temperament.train.checkpoint import write_atomic
from temperament.train.world import World


@dataclass(repr=False)
class Run:
    """What a recipe left. `json` is run.json."""

    folder: Path
    recipe: schema.Recipe
    base: Base
    state: State
    ledger: Ledger | None
    json: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        said = f", {self.delta.parameters:,} parameters changed" if self.delta is not None else ""
        return f"Run({str(self.folder)!r}, {self.json.get('status', '?')}, base {self.recipe.base!r}{said})" + (
            f"\n  {self.ledger.verdict}" if self.ledger else ""
        )

    @property
    def delta(self) -> Delta | None:
        return self.state.delta

    @property
    def model(self):
        """The tuned model: the base's modules with the whole change applied."""
        return place_on(self.base, self.state).model


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
    """Carry out a recipe in the folder `out`. A `base` already loaded (or an nn.Module as `Base`) may be given instead of its
    name."""
    recipe = schema.read(recipe, overrides)
    if recipe.study is not None:
        mend = "a study is many runs, each of them a `tune`: carry it out with `temper compare RECIPE`"
        raise UserError("study", type(recipe.study).part_name, mend)
    out = Path(out) if out is not None else Path("runs") / address(recipe.plain())[:12]
    world = World(recipe.precision.compute, recipe.log_with, recipe.device, out)
    folder = Folder(out, write=world.main)
    before = _opened(folder, world, resume, fresh)
    if differs := [] if fresh or not before else schema.differences(folder.path / "recipe.yaml", recipe):
        where = f"{', '.join(differs[:3])}{' and more' if len(differs) > 3 else ''}"
        tell("note", text=f"the recipe differs from the one this run began with ({where}); steps that changed are done anew")
    with folder.alone(), tracked(world, recipe, tell) as tell:
        return _Tuning(recipe, folder, world, base, tell).run()


def base_of(recipe: schema.Recipe, world: World) -> Base:
    """The base that a recipe names, where its rows will be: of several GPUs each process has its own. A device this machine
    lacks is refused in a sentence."""
    device = world.device if recipe.device in ("auto", world.device.type) else recipe.device
    how = {"dtype": recipe.precision.master, "device": device, "trust_remote_code": recipe.trust_remote_code}
    return load(recipe.base, own=True, **how)


def _opened(folder: Folder, world: World, resume: bool, fresh: bool) -> dict[str, Any]:
    """The main process opens the folder and the others hear what came of it: looking for themselves they would find what it has
    just written."""
    before, problem = {}, None
    if world.main:
        try:
            before = folder.open(resume, fresh)
        except TemperError as raised:
            problem = raised
    before, sentence, code = world.same((before, str(problem or ""), getattr(problem, "exit_code", 0)))
    if sentence:
        raise problem or (
            UserError("--out", str(folder.path), "the main process refused it") if code == 2 else WorkFailed(sentence)
        )
    return before


class _Tuning:
    def __init__(self, recipe: schema.Recipe, folder: Folder, world: World, base: Base | None, tell: Tell):
        self.recipe, self.folder, self.world, self.base, self.tell = recipe, folder, world, base, tell
        self.began = time.time()
        self.json: dict[str, Any] = {"status": "running", "recipe": recipe.plain(), "steps": [], "environment": environment()}

    def run(self) -> Run:
        folder, recipe = self.folder, self.recipe
        if folder.write:
            write_atomic(folder.path / "recipe.yaml", recipe.yaml())
        try:
            self.prepare()
            steps = Steps(recipe, self.base, self.skills, folder, self.world, self.tell, self.save)
            self.json |= {"steps": steps.done, "cost": steps.cost}
            if recipe.evaluation.base and self.skills.skills:
                self.measure_base(steps)
            state = steps.states["base"]
            for step in recipe.steps:
                state = steps.do(step, state)
            return self.end(steps, state)
        except Interrupted as problem:
            self.close("interrupted", str(problem))
            raise
        except KeyboardInterrupt:
            self.close("interrupted", "interrupted")
            raise Interrupted(f"Interrupted; {self.left()}. Go on with --resume.") from None
        except TemperError as problem:
            self.close("failed", str(problem))
            raise
        except Exception as problem:
            said = memory_ended(problem)
            self.close("failed", said or repr(problem))
            if said:
                raise WorkFailed(said) from problem
            raise
        finally:
            if self.base is not None:
                self.base.reset()

    def save(self, steps: Steps) -> None:
        self.folder.save_run(self.json | {"ledger": ledger_json(steps)})

    def close(self, status: str, why: str) -> None:
        self.json |= {"status": status, "error": why}
        with suppress(WorkFailed):  # a full disk may be what is being reported
            self.folder.save_run(self.json)

    def left(self) -> str:
        """What there is to go on with."""
        steps = "finished steps" if self.json["steps"] else ""
        saved = "the last checkpoint" if any((self.folder.path / "checkpoints").glob("*/step-*")) else ""
        kept = " and ".join(filter(None, (steps, saved)))
        return f"{kept} {'are' if steps else 'is'} kept" if kept else "no step was finished yet"

    def prepare(self) -> None:
        """Load the base, ask the suites for their skills, plan, check exactness on this model and data."""
        recipe = self.recipe
        if self.base is None:
            self.tell("phase", name="load", text=recipe.base)
            self.base = base_of(recipe, self.world)
        _ = self.base.reading  # before anything sets the modules otherwise
        self.json["base"] = {"id": recipe.base, "sha256": dict(self.base.sha256)}
        self.json["exceptions"] = exceptions(recipe)
        self.folder.save_run(self.json)
        self.skills = skills_of(recipe, self.base)
        for step in walk_steps(recipe.steps):
            check_watched(step, self.skills)
        if any(step.train for step in walk_steps(recipe.steps)):
            from temperament.run.plan import plan

            self.json["plan"] = plan(recipe, self.base)
            self.tell("plan", plan=self.json["plan"])
            if recipe.check:
                from temperament.run.check import check

                self.tell("phase", name="check", text="exactness on your model and data")
                self.json["check"] = check(recipe, self.base, self.world)
                self.tell("check", check=self.json["check"])

    def measure_base(self, steps: Steps) -> None:
        """The base on its own; and with the recipe's inference parts, where it has some. Constants: the user's cache keeps
        them."""
        self.tell("phase", name="base", text="measuring the base")
        of = address(self.base.sha256, self.base.reading)
        for row, skills in (("base", self.skills.alone()), *([("inference", self.skills)] if self.recipe.inference else [])):
            steps.book.measure(row, skills, cache_dir() / "scores" / f"{skills.key(of)}.json", of)

    def end(self, steps: Steps, state: State) -> Run:
        spec, json, ledger = self.recipe.evaluation, self.json, steps.book.ledger()
        json["ledger"] = ledger_json(steps)
        if state.delta is not None:
            json["delta"] = {"parameters": state.delta.parameters, "bytes": state.delta.bytes, "digest": state.delta.digest}
            if self.folder.write:
                from temperament.run.export import save_delta

                json["delta"]["files"] = save_delta(state.delta, self.base, self.folder.path / "delta", self.recipe.base)
            self.base.reset()
            subject = Subject(self.base, state.delta)
            json["diagnoses"] = {type(look).part_name: look.diagnose(subject) for look in spec.diagnose}
            json["weights"] = weights(self.base, state.delta, json["diagnoses"])
            if spec.dial:
                from temperament.run.dial import dial

                self.tell("phase", name="dial", text="sweeping the strength of the change")
                json["dial"] = dial(self.skills, state.delta, spec.dial, self.tell)
        if self.folder.write and ledger:
            write_atomic(self.folder.path / "items.json", dumps({skill: ledger.items(skill) for skill in ledger.skills}))
        self.folder.log_only({step["name"] for step in steps.done})
        steps.cost["wall_seconds"] = time.time() - self.began
        json["status"] = "done"
        self.folder.save_run(json)
        run = Run(self.folder.path, self.recipe, self.base, state, ledger, json)
        self.tell("end", run=run)
        return run


def memory_ended(problem: BaseException) -> str:
    """What to do where the machine had no more memory to give, or "" where something else went wrong."""
    full = isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError"
    if not full and "can't allocate memory" not in str(problem):
        return ""
    mend = "micro: 1 or checkpointing: true in the train step, or a smaller evaluation.batch: none changes a result"
    return f"The memory of this machine is full; set {mend}; then resume with --resume. `temper plan` says what a recipe takes."


def ledger_json(steps: Steps) -> dict[str, Any] | None:
    ledger = steps.book.ledger()
    return ledger.to_json() if ledger else None


def exceptions(recipe: schema.Recipe) -> list[str]:
    """What its parts declare that a reader of the numbers must know, a sentence each."""
    said = {type(p).part_name: " and ".join(p.part_declares) for p in walk_all(recipe) if p.part_declares}
    return [f"{name} {what}." for name, what in sorted(said.items())]


def environment() -> dict[str, Any]:
    import importlib.metadata as metadata

    import torch

    versions = {p: metadata.version(p) for p in ("torch", "transformers", "accelerate", "safetensors", "numpy")}
    machine = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return machine | {"threads": torch.get_num_threads(), "cuda": cuda, **versions}
