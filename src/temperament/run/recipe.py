"""The recipe: a validated document. Every default is visible in the resolved form; unknown keys are errors with the nearest name.

    base: lab/lm
    steps:
      - name: sft
        train:
          source: {data.file: {path: new.jsonl}}
          trainable: {adapters.lora: {rank: 8}}
          optimizer: {optim.adamw: {lr: 1e-3}}
          steps: 200

The classes below *are* the schema: their fields, defaults and comments are what `temper new` writes, what `--help` explains and what
`parts.fill` checks. YAML is read with a safe loader that refuses anchors (a few aliases can grow into gigabytes) and reads 1e-4 as a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from temperament.errors import UserError, nearest
from temperament.parts import build, fill, plain
from temperament.protocols import Aide, Builder, Decode, Merge, Objective, Optimizer, Regularizer, Source, Suite, Trainable

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
LIMIT = 1 << 20  # bytes of a recipe file


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


@dataclass(frozen=True)
class Save:
    seconds: float = 60.0  # a checkpoint at least this often
    steps: int = 0  # and every so many steps; 0: by time only
    keep: int = 2  # checkpoints kept; the newest whole one is used


@dataclass(frozen=True)
class PlayerSpec:
    objective: dict[str, Objective]  # objective by kind of batch
    optimizer: Optimizer = _part("optim.adamw", Optimizer)
    trainable: list[Trainable] = field(default_factory=list)  # its own; empty: it shares the main player's
    on: str = "policy"  # what its own stands on: a player before it, seen as it is now, or start, the model as the step began
    regularizers: list[Regularizer] = field(default_factory=list)
    every: int = 1  # it steps once in so many steps
    from_step: int = 0  # and not before this one


@dataclass(frozen=True)
class Train:
    source: Source  # where batches come from: data.file, data.mix, rollout.sample, ...
    objective: Objective | dict[str, Objective] = _part("objectives.sft.cross_entropy", Objective)  # what is optimised; by kind of batch when several come
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
        for name in ("batch", "micro"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if (self.steps or 0) < 0 or (self.epochs or 0) < 0:
            raise ValueError("steps and epochs must not be negative")


@dataclass(frozen=True)
class Merging:
    method: Merge  # how: merge.linear, merge.ties, ...
    of: list[str] = field(default_factory=list)  # steps, runs, adapters or model folders whose deltas are merged; empty: all steps before


@dataclass(frozen=True)
class Building:
    builder: Builder  # what makes the rows: a part of the data room
    limit: int | None = None  # rows at most


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
        names = [s.name or s.kind for s in self.steps]
        if self.times < 0 or len(set(names)) < len(names) or any("/" in n for n in names):
            raise ValueError(f"times must not be negative, and the steps of a round need unlike names without '/', not {names}")


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
        if self.name and not all(NAME.fullmatch(word) for word in self.name.split("/")):  # rounds join names: spin/2/pairs
            raise ValueError(f"the step name {self.name!r} becomes a folder; use letters, digits, '_', '-', '.' (at most 64)")

    @property
    def kind(self) -> str:
        return next(k for k in self.KINDS if getattr(self, k) is not None)


@dataclass(frozen=True)
class Dial:
    strengths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])  # strengths of the change that are measured
    shape: list[str] = field(default_factory=lambda: ["merge.linear"])  # merge.linear scales all blocks alike, merge.lines the deep ones more
    budget: float = 0.5  # percentage points the retained skills may lose on average
    items: int = 60  # items a skill


@dataclass(frozen=True)
class Evaluation:
    suites: list[Suite] = field(default_factory=list)  # what is measured; empty: held-out rows of the training file
    keep: bool = True  # add the automatic keep set, made from the base itself
    items: int = 100  # items a skill at most
    batch: int = 64  # rows generated together
    base: bool = True  # measure the base (cached between runs)
    every: int = 0  # steps between evaluations while training; 0: none
    dial: Dial | None = None  # sweep the strength of the change at the end
    diagnose: list[str] = field(default_factory=lambda: ["diagnose.intruder_dimensions"])  # diagnoses of the final change


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
    log_with: str | None = None  # tracker by Accelerate: tensorboard, wandb, mlflow, ...

    def plain(self) -> dict[str, Any]:
        return plain(self)

    def yaml(self) -> str:
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True, width=120)

    def names(self) -> list[str]:
        return [s.name for s in self.steps]


def read(source: str | Path | Mapping[str, Any] | Recipe, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a YAML file (or a mapping, or already built), with `a.b=c` overrides applied. Relative paths in it are relative
    to the current folder."""
    if isinstance(source, Recipe):
        source = source.plain()
    document = dict(source) if isinstance(source, Mapping) else _read_yaml(Path(source))
    for override in overrides:
        _override(document, override)
    return _named(fill(Recipe, document, ""))


def _named(recipe: Recipe) -> Recipe:
    """Every step gets its name; two of the same name are refused."""
    from dataclasses import replace

    steps, seen = [], set()
    for i, step in enumerate(recipe.steps):
        name = step.name or f"{step.kind}-{i + 1}"
        if "/" in name:
            raise UserError(f"steps[{i}].name", name, "the step name becomes a folder; use letters, digits, '_', '-', '.'")
        if name in seen or name in ("base", "previous", "start"):
            raise UserError(f"steps[{i}].name", name, "already taken; give each step its own name")
        seen.add(name)
        if step.start not in ("previous", "base", *(s.name for s in steps)):
            raise UserError(f"steps[{i}].start", step.start, f"not a step before this one; {nearest(step.start, ['previous', 'base', *(s.name for s in steps)])}")
        _readable(step, name, {s.name for s in steps})
        steps.append(replace(step, name=name))
    return replace(recipe, steps=steps)


def _readable(step: Step, name: str, before: set[str]) -> None:
    """Every step that a part reads (its `inputs`) stands before it, outside or in the same round."""
    from temperament.run.artefacts import walk_all

    for inner in step.rounds.steps if step.rounds else ():
        _readable(inner, f"{name}/{inner.name or inner.kind}", before)
        before = {*before, inner.name or inner.kind}
    for spec in (step.train, step.build):
        for p in walk_all(spec) if spec else ():
            for read in getattr(p, "inputs", ()):
                if read not in before:
                    raise UserError(f"{name}.{type(p).part_name}", read, f"not a step before this one; {nearest(read, before)}")


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses aliases and duplicate keys, and reads 1e-4 as a float."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.YAMLError(f"the key {key.value!r} stands twice, in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {k: [r for r in v if r[0] != "tag:yaml.org,2002:timestamp"] for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


def parse_yaml(text: str, field: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        reason = " ".join(str(getattr(problem, "problem", None) or problem).split())
        mark = getattr(problem, "problem_mark", None)
        raise UserError(field, f"line {mark.line + 1}" if mark else text[:60], f"this is no plain YAML ({reason[:160]})") from None


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
        raise UserError("recipe", str(path), f"could not be read as text ({getattr(problem, 'strerror', None) or 'not UTF-8'})") from None
    document = parse_yaml(text, str(path))
    if not isinstance(document, dict) or not all(isinstance(k, str) for k in document):
        raise UserError("recipe", str(path), "a recipe is a mapping with `base:` and `steps:`")
    return document


def _override(document: dict[str, Any], override: str) -> None:
    """`steps.0.train.optimizer.optim.adamw.lr=1e-4`, or by step name: `sft.train.steps=50`. Part names may be walked with their dots."""
    path, eq, text = override.partition("=")
    if not eq or not path:
        raise UserError("--set", override, "write key=value, e.g. steps.0.train.steps=100")
    value, here, done = parse_yaml(text, "--set") if text else None, document, ""
    keys = path.split(".")
    while keys:
        # The longest run of remaining words that is a key here: part names contain dots.
        took = next((n for n in range(len(keys), 0, -1) if isinstance(here, dict) and ".".join(keys[:n]) in here), 1)
        key: Any = ".".join(keys[:took])
        keys = keys[took:]
        if isinstance(here, list):
            names = {s.get("name"): i for i, s in enumerate(here) if isinstance(s, dict)}
            key = names.get(key, int(key) if key.isdigit() else None)
            if key is None or key >= len(here):
                raise UserError("--set", override, f"{done or 'the list'} has {len(here)} entries and none is {path.split('.')[0]!r}")
        elif isinstance(here, dict) and not done and key not in here and any(isinstance(s, dict) and s.get("name") == key for s in here.get("steps", ())):
            here, keys, key = here["steps"], [key, *keys], None
        if key is None:
            continue
        if not keys:
            if not isinstance(here, (dict, list)):
                raise UserError("--set", override, f"{done!r} is not a mapping")
            here[key] = value
            return
        if isinstance(here, dict) and isinstance(here.get(key), str) and keys:
            here[key] = {here[key]: {}}  # a part given by its bare name gets options
        elif isinstance(here, dict) and here.get(key) is None:
            here[key] = {}
        done, here = f"{done}.{key}".lstrip("."), here[key]
        if not isinstance(here, (dict, list)):
            raise UserError("--set", override, f"{done!r} is {here!r}, not a mapping")
