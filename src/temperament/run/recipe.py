"""The recipe: a validated document. Every default is visible in the resolved form; unknown keys are errors with the nearest
name.

    base: lab/lm
    steps:
      - name: sft
        train:
          source: {data.file: {path: new.jsonl}}
          trainable: {adapters.lora: {rank: 8}}
          optimizer: {optim.adamw: {lr: 1e-3}}
          steps: 200

The classes below *are* the schema: their fields, defaults and comments are what `temper new` writes, what `--help` explains
and what `parts.fill` checks. YAML is read with a safe loader that refuses anchors (a few aliases can grow into gigabytes)
and reads 1e-4 as a number."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from temperament.errors import Unusable, UserError, nearest
from temperament.parts import build, fill, index, must_be, plain
from temperament.protocols import (
    Aide,
    Builder,
    Decode,
    Diagnosis,
    Merge,
    Objective,
    Optimizer,
    Regularizer,
    Shape,
    Source,
    Study,
    Suite,
    Trainable,  # fmt: skip
)

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
LIMIT = 1 << 20  # bytes of a recipe file


def at_least(spec: Any, **smallest: int) -> None:
    for name, least in smallest.items():
        if getattr(spec, name) < least:
            raise ValueError(f"{name} must be at least {least}, not {getattr(spec, name)}")


def _part(spec: Any, slot: type):
    return field(default_factory=lambda: [build(s, slot) for s in spec] if isinstance(spec, list) else build(spec, slot))


@dataclass(frozen=True)
class Precision:
    compute: Literal["fp32", "bf16", "fp16"] = "fp32"  # dtype of the forward and backward (autocast)
    master: Literal["fp32", "bf16"] = "fp32"  # dtype the trained weights and moments are kept in; bf16 loses small updates


@dataclass(frozen=True)
class Stop:
    skill: str = "target"  # skill that is watched; "target": the mean of the target skills
    reach: float = 0.9  # end the step once the skill is at least this
    every: int = 25  # steps between two looks
    items: int = 100  # items looked at

    def __post_init__(self):
        at_least(self, every=1, items=1)


@dataclass(frozen=True)
class Save:
    seconds: float = 60.0  # a checkpoint at least this often
    steps: int = 0  # and every so many steps; 0: by time only
    keep: int = 2  # checkpoints kept; the newest whole one is used

    def __post_init__(self):
        at_least(self, steps=0, keep=1)


@dataclass(frozen=True)
class PlayerSpec:
    objective: dict[str, Objective]  # objective by kind of batch
    optimizer: Optimizer = _part("optim.adamw", Optimizer)
    trainable: list[Trainable] = field(default_factory=list)  # its own; empty: it shares the main player's
    on: str = "policy"  # what its own stands on: a player before it, seen as it is now, or start, the model as the step began
    regularizers: list[Regularizer] = field(default_factory=list)
    every: int = 1  # it steps once in so many steps
    from_step: int = 0  # and not before this one

    def __post_init__(self):
        at_least(self, every=1, from_step=0)


@dataclass(frozen=True)
class Train:
    source: Source  # where batches come from: data.file, data.mix, rollout.sample, ...
    objective: Objective | dict[str, Objective] = _part("objectives.sft.cross_entropy", Objective)  # or one by kind of batch
    trainable: list[Trainable] = _part(["select.full"], Trainable)  # what is updated: a selection, an adapter, or a stack
    optimizer: Optimizer = _part("optim.adamw", Optimizer)  # how; its lr may be a schedule
    regularizers: list[Regularizer] = field(default_factory=list)  # what keeps it near what it knew
    steps: int | None = None  # optimizer steps; or give epochs
    epochs: float | None = None  # passes over the data
    batch: int = 16  # examples in one optimizer step, over all processes
    micro: int = 16  # rows in one forward; smaller saves memory and changes nothing else
    clip: float | None = 1.0  # largest gradient norm; null: unclipped
    ema: float | None = None  # decay of a running mean kept as version `ema`
    keep: Literal["live", "ema", "best"] = "live"  # which version the step leaves
    checkpointing: bool = False  # recompute activations in the backward: less memory, more time
    stop: Stop | None = None  # end early at a level of a skill (matched gain)
    save: Save = field(default_factory=Save)
    players: dict[str, PlayerSpec] = field(default_factory=dict)  # further players: critic, discriminator, ...

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        at_least(self, batch=1, micro=1)
        if not self.trainable:
            raise ValueError("trainable is empty: name a selection or an adapter")
        if (self.steps or 0) < 0 or (self.epochs or 0) < 0:
            raise ValueError("steps and epochs must not be negative")
        if math.isinf(self.epochs or 0):
            raise ValueError("epochs must be finite")
        if self.clip is not None and self.clip <= 0:
            raise ValueError("clip must be above 0, or null for none")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError("ema must lie between 0 and 1")


@dataclass(frozen=True)
class Merging:
    method: Merge  # how: merge.linear, merge.ties, ...
    of: list[str] = field(default_factory=list)  # steps, runs, adapters or model folders; empty: all steps before


@dataclass(frozen=True)
class Building:
    builder: Builder  # what makes the rows: a part of the data room
    limit: int | None = None  # rows at most

    def __post_init__(self):
        if self.limit is not None:
            at_least(self, limit=1)


@dataclass(frozen=True)
class Until:
    skill: str = "target"  # skill that is watched
    above: float | None = None  # end the rounds once it is at least this
    gains_less: float | None = None  # or once a round gains less than this


@dataclass(frozen=True)
class Rounds:
    times: int  # rounds at most
    steps: list[Step]  # what one round does
    start: Literal["previous", "base", "start"] = "previous"  # version each round begins from; start: as before the first round
    until: Until | None = None  # stop rule, looked at after each round

    def __post_init__(self):
        at_least(self, times=0)
        if not self.steps:
            raise ValueError("rounds need at least one step")


@dataclass(frozen=True)
class ForEach:
    values: dict[str, list[Any]]  # name -> values; {name} in the steps is replaced; several names go together
    steps: list[dict[str, Any]]  # what is done for each


@dataclass(frozen=True)
class Condition:
    skill: str  # skill of the last measured row
    below: float | None = None  # run when it is below this
    above: float | None = None  # or at least this


@dataclass(frozen=True)
class Step:
    name: str = ""  # how ledger rows, folders and later steps call it; default: kind and number
    train: Train | None = None
    build: Building | None = None
    merge: Merging | None = None
    measure: bool | None = None
    rounds: Rounds | None = None
    foreach: ForEach | None = None
    when: Condition | None = None  # run only if; otherwise the step leaves what it found
    start: str = "previous"  # what it starts from: previous, base, or the name of a step
    ledger: bool = True  # measure after it

    KINDS = ("train", "build", "merge", "measure", "rounds", "foreach")

    def __post_init__(self):
        given = [k for k in self.KINDS if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"a step is exactly one of {', '.join(self.KINDS)}; this one is {' and '.join(given) or 'none'}")

    @property
    def kind(self) -> str:
        return next(k for k in self.KINDS if getattr(self, k) is not None)


@dataclass(frozen=True)
class Dial:
    strengths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])  # of the change, measured
    shape: list[str] = field(default_factory=lambda: ["merge.linear"])  # all blocks alike; merge.lines: the deep ones more
    budget: float = 0.5  # percentage points the retained skills may lose on average
    items: int = 60  # items a skill

    def __post_init__(self):
        at_least(self, items=1)
        if not all(math.isfinite(s) for s in self.strengths):
            raise ValueError("strengths must be finite")
        for name in self.shape:
            must_be(name, Shape, "evaluation.dial.shape")


@dataclass(frozen=True)
class Evaluation:
    suites: list[Suite] = field(default_factory=list)  # what is measured; empty: held-out rows of the training file
    keep: bool = True  # add the automatic keep set, made from the base itself
    items: int = 100  # items a skill at most
    batch: int = 64  # rows generated together
    base: bool = True  # measure the base (cached between runs)
    every: int = 0  # steps between evaluations while training; 0: none
    dial: Dial | None = None  # sweep the strength of the change at the end
    diagnose: list[Diagnosis] = _part(["diagnose.intruder_dimensions"], Diagnosis)  # diagnoses of the final change

    def __post_init__(self):
        at_least(self, items=1, batch=1, every=0)


@dataclass(frozen=True)
class Recipe:
    base: str  # lab/lm, a folder, or a Hugging Face id
    steps: list[Step] = field(default_factory=list)  # what is done, in order
    seed: int = 0  # every draw follows from it
    aides: dict[str, Aide] = field(default_factory=dict)  # frozen helpers by role
    inference: list[Decode] = field(default_factory=list)  # parts of decoding that belong to the system
    evaluation: Evaluation = field(default_factory=Evaluation)
    precision: Precision = field(default_factory=Precision)
    device: str = "auto"  # auto, cpu, cuda
    trust_remote_code: bool = False  # run Python that comes with a model folder: only if you trust it
    check: bool = True  # the exactness check before training
    study: Study | None = None  # many runs of this recipe under one protocol: carried out by `temper compare`
    log_with: str | None = None  # tracker by Accelerate: tensorboard, wandb, mlflow, ...

    def __post_init__(self):
        if ":" in self.device:
            one = self.device.partition(":")[2]
            mend = f"a run takes the GPUs it is shown: give cuda, and choose one with CUDA_VISIBLE_DEVICES={one}"
            raise UserError("device", self.device, mend)

    def plain(self) -> dict[str, Any]:
        return plain(self)

    def yaml(self) -> str:
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True, width=120)

    def names(self) -> list[str]:
        return [s.name for s in self.steps]


def read(source: str | Path | Mapping[str, Any] | Recipe, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a YAML file (or a mapping, or already built), with `a.b=c` overrides applied. Relative paths in it are
    relative to the current folder."""
    if isinstance(source, Recipe):
        source = source.plain()
    document = deepcopy(dict(source)) if isinstance(source, Mapping) else _read_yaml(Path(source))
    for override in overrides:
        _override(document, override)
    return _named(fill(Recipe, document, ""))


def _named(recipe: Recipe) -> Recipe:
    """Every step gets its name, those inside of rounds too; names and references that cannot be are refused."""
    steps = _names(_default_names(recipe.steps), "steps", [])
    for train in (s.train for s in walk_steps(steps) if s.train):
        if train.keep == "ema" and train.ema is None:
            raise UserError("train.keep", "ema", "no running mean is kept; give its decay, e.g. ema: 0.99")
        if train.keep == "best" and not (train.stop or recipe.evaluation.every):
            raise UserError("train.keep", "best", "nothing is looked at while training; set evaluation.every, or train.stop")
    _versioned(steps)
    return replace(recipe, steps=steps)


VERSIONS = ("live", "base", "start", "ema", "best")  # what a part may name; a player's own: critic:start


def _versioned(steps: list[Step]) -> None:
    """Every version that a part reads is one that its step holds."""
    from temperament.run.artefacts import walk_all

    for step in walk_steps(steps):
        for p in walk_all(step.train) if step.train else ():
            for player, _, version in (n.rpartition(":") for n in getattr(p, "needs", ())):
                if player and player not in (players := ("policy", *step.train.players)):
                    known = f"no player is called so; {nearest(player, players)}"
                    raise UserError(f"{step.name}.{type(p).part_name}", f"{player}:{version}", known)
                if version not in VERSIONS:
                    known = f"a step holds the versions {', '.join(VERSIONS)}"
                    raise UserError(f"{step.name}.{type(p).part_name}", version, f"{known}; {nearest(version, VERSIONS)}")
                if version == "ema" and step.train.ema is None:
                    mend = "a part reads the version `ema`; give its decay, e.g. ema: 0.99"
                    raise UserError(f"{step.name}.train.ema", None, mend)
                if version == "best" and step.train.keep != "best":
                    mend = "a part reads the version `best`; let the step keep it, with keep: best"
                    raise UserError(f"{step.name}.train.keep", step.train.keep, mend)


def _names(steps: list[Step], where: str, outer: list[str], within: tuple[str, ...] = ()) -> list[Step]:
    """outer: steps before these; within: the rounds and foreach they are inside of, whose end is none of theirs to read."""
    from temperament.run.artefacts import walk_all

    made: list[Step] = []
    for i, step in enumerate(steps):
        name, before = step.name, [*outer, *(s.name for s in made)]
        if not NAME.fullmatch(name):
            raise UserError(
                f"{where}[{i}].name", name, "it becomes a folder; use letters, digits, '_', '-' and '.', at most 64"
            )
        if name in (*before, *within, "base", "previous", "start", "inference"):
            raise UserError(f"{where}[{i}].name", name, "already taken; give each step its own name")
        holder = next((s.name for s in made if (s.rounds or s.foreach) and name.startswith(s.name + ".")), None)
        if holder:
            raise UserError(
                f"{where}[{i}].name",
                name,
                f"names that begin with '{holder}.' belong to the steps inside of {holder!r}; choose another",
            )
        for key, of in (("start", [step.start]), ("merge.of", step.merge.of if step.merge else [])):
            for k in of:
                if k in ("previous", "base", *before) or (
                    key == "merge.of" and (Path(k).exists() or re.split(r"[./]", k)[0] in (*before, *within))
                ):
                    continue
                what = "not a step before this one" if key == "start" else "neither a step before this one nor a folder"
                raise UserError(
                    f"{where}[{i}].{key}",
                    k,
                    f"{what}; {nearest(k, ['previous', 'base', *before] if key == 'start' else before)}",
                )
        for part in (p for spec in (step.train, step.build) if spec for p in walk_all(spec)):
            for k in getattr(part, "inputs", ()):  # steps that a part reads
                if k not in before:
                    raise UserError(
                        f"{where}[{i}].{type(part).part_name}", k, f"not a step before this one; {nearest(k, before)}"
                    )
        if step.rounds:
            inner = _names(step.rounds.steps, f"{where}[{i}].rounds.steps", before, (*within, name))
            step = replace(step, rounds=replace(step.rounds, steps=inner))
        if step.foreach:
            unrolled(step)
            _names(_templates(step, 0), f"{where}[{i}].foreach.steps", before, (*within, name))
        made.append(step)
    return made


def _default_names(steps: list[Step]) -> list[Step]:
    named = lambda r: r and replace(r, steps=_default_names(r.steps))
    return [replace(s, name=s.name or f"{s.kind}-{i + 1}", rounds=named(s.rounds)) for i, s in enumerate(steps)]


# ---- steps inside of steps ---------------------------------------------------------------------------------------------------


def walk_steps(steps: Iterable[Step]) -> Iterator[Step]:
    """Every step, those of rounds (once) and of foreach (for each value) included."""
    for step in steps:
        yield step
        if step.rounds:
            yield from walk_steps(step.rounds.steps)
        if step.foreach:
            yield from walk_steps(unrolled(step))


def inside(steps: list[Step], prefix: str) -> list[Step]:
    """Steps under the name of what holds them; what they say of each other follows."""
    mine = {s.name for s in steps}

    def moved(step: Step) -> Step:
        there = lambda n: prefix + n if n in mine else n
        merge = step.merge and replace(step.merge, of=[there(n) for n in step.merge.of])
        rounds = step.rounds and replace(step.rounds, steps=[moved(s) for s in step.rounds.steps])
        return replace(step, start=there(step.start), merge=merge, rounds=rounds)

    return [replace(moved(s), name=prefix + s.name) for s in steps]


def unrolled(step: Step) -> list[Step]:
    """The steps of a foreach, with {name} replaced; named STEP.1.INNER, STEP.2.INNER, ..."""
    values = step.foreach.values
    lengths = {len(v) for v in values.values()}
    if len(lengths) != 1 or not max(lengths):
        raise UserError(
            f"{step.name or 'foreach'}.foreach.values", values, "give at least one list of values, all of the same length"
        )
    return [s for i in range(lengths.pop()) for s in inside(_templates(step, i), f"{step.name}.{i + 1}.")]


def _templates(step: Step, i: int) -> list[Step]:
    here = {n: v[i] for n, v in step.foreach.values.items()}
    made = [
        fill(Step, _filled(t, here), f"{step.name}.foreach.steps[{k}]".lstrip(".")) for k, t in enumerate(step.foreach.steps)
    ]
    return _default_names(made)


def _filled(value: Any, here: dict[str, Any]) -> Any:
    if isinstance(value, str):
        for name, v in here.items():
            if value == "{" + name + "}":
                return v
            value = value.replace("{" + name + "}", str(v))
        return value
    if isinstance(value, Mapping):
        return {_filled(k, here): _filled(v, here) for k, v in value.items()}
    return [_filled(v, here) for v in value] if isinstance(value, list) else value


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses aliases and duplicate keys, and reads 1e-4 as a float."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"the key in line {key.start_mark.line + 1} is a list or a mapping; a key is a word")
            if key.value in seen:
                raise yaml.YAMLError(f"the key {key.value!r} stands twice, in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


NOT_AS_YAML_1_1 = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:bool")  # `on`, `no`, a date: words, as they are meant
_Loader.yaml_implicit_resolvers = {
    k: [r for r in v if r[0] not in NOT_AS_YAML_1_1] for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def parse_yaml(text: str, field: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as problem:  # tags such as !!int x
        reason = " ".join(str(getattr(problem, "problem", None) or problem).split())
        mark = getattr(problem, "problem_mark", None)
        if mark and "\n" in text.strip():
            raise Unusable(f"{field}, line {mark.line + 1}", None, f"this is no plain YAML ({reason[:160]})") from None
        raise UserError(field, text[:60], f"this is no plain YAML ({reason[:160]})") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        if path.is_dir() and (path / "recipe.yaml").exists():
            path = path / "recipe.yaml"
        if path.stat().st_size > LIMIT:
            raise UserError("recipe", str(path), "larger than 1 MiB; a recipe is a page of YAML")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError("recipe", str(path), "no such file; `temper new` writes one") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(
            "recipe", str(path), f"could not be read as text ({getattr(problem, 'strerror', None) or 'not UTF-8'})"
        ) from None
    document = parse_yaml(text, str(path))
    if not isinstance(document, dict) or not all(isinstance(k, str) for k in document):
        raise UserError("recipe", str(path), "a recipe is a mapping with `base:` and `steps:`")
    return document


def _override(document: dict[str, Any], override: str) -> None:
    """`steps.0.train.optimizer.optim.adamw.lr=1e-4`, or by step name: `sft.train.steps=50`. Part names may be walked with their
    dots."""
    path, eq, text = override.partition("=")
    if not eq or not all(path.split(".")):
        raise UserError("--set", override, "write key=value, e.g. steps.0.train.steps=100")
    value, here, done = parse_yaml(text, "--set") if text else None, document, ""
    keys = path.split(".")
    named = (
        [s for s in document.get("steps") or () if isinstance(s, dict) and s.get("name")]
        if isinstance(document.get("steps"), list)
        else []
    )
    while keys:
        if (
            here is document
            and keys[0] not in document
            and (found := next((s for s in named if s["name"] == _first(keys, [s["name"]])), None))
        ):
            keys, here, done = keys[found["name"].count(".") + 1 :], found, found["name"]
            if not keys:
                raise UserError(
                    "--set", override, "this names a whole step; say which of its keys, e.g. " + done + ".train.steps=100"
                )
            continue
        if isinstance(here, list):
            steps = {s["name"]: i for i, s in enumerate(here) if isinstance(s, dict) and isinstance(s.get("name"), str)}
            key: Any = _first(keys, steps)
            keys = keys[key.count(".") + 1 :]
            at = steps.get(key, int(key) if key.isdecimal() and len(key) < 6 else -1)
            if not 0 <= at < len(here):
                raise UserError("--set", override, f"{done or 'the list'} has {len(here)} entries and none is {key!r}")
            key = at
        else:
            # Names of parts contain dots; a part that is not written out yet is found in the registry.
            key = _first(keys, here) if _first(keys, here) in here else _first(keys, index())
            keys = keys[key.count(".") + 1 :]
        if not keys:
            here[key] = value
            return
        if isinstance(here[key] if isinstance(here, list) else here.get(key), str):
            here[key] = {here[key]: {}}  # a part given by its bare name gets options
        elif isinstance(here, dict) and here.get(key) is None:
            here[key] = {}
        done, here = f"{done}.{key}".lstrip("."), here[key]
        if not isinstance(here, (dict, list)):
            raise UserError("--set", override, f"{done!r} is {here!r}, not a mapping")


def _first(keys: list[str], known: Iterable[str]) -> str:
    """The longest run of leading words that is known, else the first word."""
    return next((k for n in range(len(keys), 0, -1) if (k := ".".join(keys[:n])) in known), keys[0])


def differences(stored: Path, recipe: Recipe) -> list[str]:
    """Where a recipe differs from the one kept in a file, by place; [] where there is none to compare with."""
    try:
        return _apart(read(stored).plain(), recipe.plain()) if stored.exists() else []
    except UserError:  # kept by another version: what it says cannot be compared
        return []


def _apart(a: Any, b: Any, at: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = dict.fromkeys([*a, *b])
        return [p for k in keys for p in _apart(a.get(k), b.get(k), f"{at}.{k}" if at else str(k))]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [p for i, (x, y) in enumerate(zip(a, b, strict=True)) for p in _apart(x, y, f"{at}.{i}")]
    return [] if a == b else [at]
