"""What a part must be able to do to fill a place: the signatures every room is written against.

A protocol names the `rooms` whose parts may fill it and the methods they `must` have; everything else a part may add is
*optional* and looked up by name, so a method states only what it needs. Nothing here imports torch.

Of any room, optional: `inputs`, names of earlier steps whose artefacts the part reads (`ctx.delta(name)`,
`ctx.artefacts[name]`): the recipe is refused where there is no such step before it, and the part's own step is done anew when
theirs changed; `fingerprint()` of the files it reads, to the same end.

How a train step meets them, in order:

    source.open(ctx) -> stream                    stream.batch(k) -> whole effective batch(es), the same on every process
    trainable.build(base, ctx) -> Live            what the optimizer sees; holds versions (`live.at("start")`)
    objective.prepare(whole, views) -> whole      once: reference log-probs, advantages, matching
    objective.counts(whole) -> {term: count}      known before the first backward
    objective.loss(micro, views) -> {term: Term}  sums, never means; the loop divides each term once by its own count
    regularizer.counts / .loss                    the same; `per = "step"` for penalties counted once a step
    optimizer.build(parameters, ctx) -> stepper   sees parameter records: place, depth, role, partner, base weight
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from temperament.delta import Delta
    from temperament.nn.batch import Batch


@dataclass(frozen=True)
class Progress:
    """Where a train step stands. share: 0 at the first update, 1 at the last."""

    step: int
    total: int
    epoch: float = 0.0
    round: int = 0

    @property
    def share(self) -> float:
        return self.step / max(self.total - 1, 1)


@dataclass
class Term:
    """One named part of a loss: a sum over what it counts, never a mean.

    value: tensor of per-example (or per-token) values, or their sum; the sum is taken here. count: how many of them there
    are in *this* micro-batch (float weights allowed; 0 adds nothing). weight: its factor in the total.
    """

    value: Tensor
    count: float
    weight: float = 1.0

    def __post_init__(self):
        if self.value.dim():
            self.value = self.value.sum()


Terms = dict[str, Term]


@dataclass(frozen=True)
class Outcome:
    """What one model did with one item. `score` is 1 for right, 0 for wrong, or graded; None where the measure is set-level."""

    id: str
    skill: str
    prompt: str = ""
    expected: str = ""
    output: str = ""
    score: float | None = None
    nll: float | None = None  # of the expected answer, nats per token
    kl: float | None = None  # to the base on this item, nats per token
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for measure in ("score", "nll", "kl"):  # a number that is not finite is no measurement
            value = getattr(self, measure)
            if value is not None:
                object.__setattr__(self, measure, float(value) if math.isfinite(value) else None)


# ---- slots -----------------------------------------------------------------------------------------------------------------


class Schedule(Protocol):
    """A number that changes while training: `schedule(progress) -> float`, a pure function."""

    rooms: ClassVar = ("schedules",)
    must: ClassVar = ("__call__",)

    def __call__(self, progress: Progress) -> float: ...


class Trainable(Protocol):
    """What is updated, or (a surgery in the stack) what is changed so that the rest can be. `build(base, ctx)` returns a
    `Trained` (train/live.py) on the base's modules; the runner attaches it.

    Optional: `prepare(base, ctx, batches) -> {name: tensor}`, a pass over the data that training will see, before anything
    is built. What it returns is kept with the step, so a resumed run does not look again, and is `ctx.prepared` while the
    part is built (empty where nobody looked: the exactness check builds without). `rebuild(base, name, addition) -> (module,
    Around)`, for parts whose change is more than weights: the module an addition of theirs stands for, to be attached when a
    delta is loaded. Its tensors are called as that module's parameters are, so that a soup can mix them."""

    rooms: ClassVar = ("select", "adapters", "surgery", "merge")  # a learned merge is trained: its coefficients or masks
    must: ClassVar = ("build",)

    def build(self, base: Any, ctx: Any) -> Any: ...


class Start(Protocol):
    """How a low-rank adapter begins at a place: `factors(place, rank, prepared, seed) -> (A, B)`, or None where it gets no
    adapter.

    Optional: `prepare(base, ctx, batches, places, rank) -> {name: tensor}`, given back as `prepared`; without it `prepared`
    is empty."""

    rooms: ClassVar = ("adapters.init",)
    must: ClassVar = ("factors",)


class Objective(Protocol):
    """What is optimised. `batch`: the kinds of batch it takes ("Tokens", "Pairs", ...). `needs`: versions it reads
    ("start", "base", "ema", "best"), provided before the first step.

    Optional: `prepare(whole, views) -> whole`, once; what it fills into the batch the players after it see. `updates(whole,
    views) -> wholes`: the optimizer steps taken on one prepared batch (epochs and mini-batches of a rollout); default one. A
    *coupled* loss (not a sum over examples) gives `statistics(micro, views) -> (rows, ...) tensor` and `couple(all
    statistics) -> Terms` instead of `loss`: the loop runs two passes, exact under any split."""

    rooms: ClassVar = ("objectives",)
    must: ClassVar = ("batch", "counts")
    scheduled: ClassVar = True
    batch: ClassVar[tuple[str, ...]]

    def counts(self, whole: Batch) -> dict[str, float]: ...
    def loss(self, micro: Batch, views: Any) -> Terms: ...


class Regularizer(Protocol):
    """A term that keeps the model near what it knew. `per = "batch"`: counts/loss like an objective, on the same micro-batch.
    `per = "step"`: `loss(None, views)` once an optimizer step; its terms have count 1.

    Optional: `prepare(whole, views)`, once for the whole batch before its first forward: the statistics without gradient of
    a term that couples the batch. Modules of a trainable may bring such terms of their own (`Trained.terms`).

    One that remembers from step to step builds what remembers: `build(base, ctx) -> object` with the methods above, and
    optionally `after_step(progress)`, the only moment at which its memory may move, and `state_dict() -> {name: tensor}`,
    `load_state_dict`, kept in the checkpoint. A part that builds may look at the data first, as a trainable does: its own
    `prepare(base, ctx, batches)`, found again in `ctx.prepared`."""

    rooms: ClassVar = ("regularizers",)
    must: ClassVar = ("per",)  # and loss, of the part or of what it builds
    scheduled: ClassVar = True


class Optimizer(Protocol):
    """`build(parameters, ctx) -> stepper` with torch's optimizer interface (param_groups, step, state_dict). `lr` is
    scheduled by the loop: group["lr"] = lr(progress) * group.get("lr_factor", 1)."""

    rooms: ClassVar = ("optim",)
    must: ClassVar = ("build", "lr")
    scheduled: ClassVar = ("lr",)


class Source(Protocol):
    """Where batches come from. `open(ctx) -> stream`; `stream.batch(step, progress) -> Batch | list[Batch]` is the whole
    effective batch of all processes. `yields`: kinds of batch; `needs`: versions it reads; `generates`: are its rows sampled
    from the model that trains (`ctx.live`)? One that wraps another need not say it again. Optional on the stream:
    `steps_per_epoch`, `feedback(batches, row) -> more of the row` (what the log shall say), `largest()`, the largest batch
    it can give, with values of no meaning (for the plan, where making a real one would take the model), `state_dict() ->
    {"tensors": ..., "json": ...}` and `load_state_dict` (only for what is not a function of the step: a buffer, texts
    sampled earlier). A part that reads numbers anew at each step names them: `scheduled: ClassVar = ("temperature",)`."""

    rooms: ClassVar = ("data", "rollout")
    must: ClassVar = ("open", "yields")
    generates: ClassVar = False


class Examples(Protocol):
    """Rows of text: `examples(ctx) -> list[Example]` (engine/examples.py). What sources, rollouts and suites read."""

    rooms: ClassVar = ("data",)
    must: ClassVar = ("examples",)


class Held(Protocol):
    """Rows with some kept out of training: `held(ctx)` those, `read(ctx)` all, `called` its name, `encoding(base)` how they are
    encoded."""

    rooms: ClassVar = ("data",)
    must: ClassVar = ("held", "read", "encoding", "called")


class Pictured(Protocol):
    """Pictures of named classes: `classes(base) -> list[str]`, the names behind its labels; `held(base) -> list[Picture]`
    (engine/pictures.py), those it keeps out of training; `called`, the name of what they ask."""

    rooms: ClassVar = ("data",)
    must: ClassVar = ("classes", "held", "called")


class Gallery(Protocol):
    """Pictures with their captions: `pictures(ctx) -> list[Picture]` (engine/pictures.py). What sources and suites of
    generators read."""

    rooms: ClassVar = ("data",)
    must: ClassVar = ("pictures",)


class Visited(Protocol):
    """Pictures met in a fixed order, each once: `visits(base) -> [(what they are, pictures)]`, `classes(base)` as of Pictured.
    What its stream was told of each before it was learnt from lies in the step's folder (engine/record.py)."""

    rooms: ClassVar = ("rollout",)
    must: ClassVar = ("visits", "classes")


class Builder(Protocol):
    """A `build` step: makes a data set, models in the loop. `make(ctx) -> Iterable[item | Rejection]`; provenance is kept."""

    rooms: ClassVar = ("data",)
    must: ClassVar = ("make",)


class Reward(Protocol):
    """Scores a group of responses to one prompt: `score(prompt, outputs, row) -> list[float | None]`; None: not applicable."""

    rooms: ClassVar = ("rewards",)
    must: ClassVar = ("score",)
    scheduled: ClassVar = True


class PictureReward(Protocol):
    """What a picture is worth: `value(pixels, captions) -> (rows,)` of pixels (rows, 3, H, W) in 0..1 as the model made them,
    not cut, so that a gradient goes through them wherever the reward has one."""

    rooms: ClassVar = ("rewards",)
    must: ClassVar = ("value",)
    scheduled: ClassVar = True


class Merge(Protocol):
    """`merge(base, deltas) -> Delta`, streamed by tensor; a wrapper takes another Merge in a slot.

    Most inherit `delta.merging.Blockwise` and state `plan(site)`: the same statement then serves in memory and streamed from
    folders. Optional: `search(base, deltas, score) -> (Delta, what was tried)`, where score(delta) is the mean of the target
    skills on development items; `fuse(models, batches) -> module` and `inputs(base, models) -> batches`, for models of
    different origin or a result of another width, held in memory, with `check(n)` that refuses too few or too many. A merge
    learned by gradient is a Trainable of this room."""

    rooms: ClassVar = ("merge",)
    must: ClassVar = ("merge",)

    def merge(self, base: Any, deltas: Sequence[Delta]) -> Delta: ...


class Shape(Protocol):
    """A way to scale a delta by one strength: `scale_delta(delta, strength, places) -> Delta`. What the dial sweeps."""

    rooms: ClassVar = ("merge",)
    must: ClassVar = ("scale_delta",)


class Decode(Protocol):
    """What belongs to answering beside the weights: `hooks(base) -> objects with logits / on_token / stop` on the generation
    loop (engine/tokens.py); of the room `sample`, `engine.denoise.Hook`s on the denoising loop, and optionally `sampler`,
    how many steps it takes. Optional, where there are words: `models(base) -> {name: model}`, decoded in lockstep with the
    subject, which is called "model"; `loop`, another generation loop with the same call, or None; `ask(prompt)`,
    `hear(output)` and `tell(answer)`, the prompt and the output in another form and the way back: hear(tell(a)) = a."""

    rooms: ClassVar = ("decode", "sample")
    must: ClassVar = ("hooks",)


class Diagnosis(Protocol):
    """`diagnose(subject) -> dict` of plain numbers and tables; a subject is one model, two, several, or a run."""

    rooms: ClassVar = ("diagnose",)
    must: ClassVar = ("diagnose",)


class Suite(Protocol):
    """Skills to measure: `skills(ctx) -> list[Skill]`, each with items, a role and `measure(system) -> list[Outcome]`
    (engine/measure.py). A skill whose number is one of the whole set (a distance between pictures) has `of_set(outcomes) ->
    value(rows)`, the number of any resampled rows."""

    rooms: ClassVar = ("evaluate",)
    must: ClassVar = ("skills",)


class Study(Protocol):
    """A protocol over many runs: `plan(recipe, done) -> (address, recipe)` of each in order, where `done` fills as they end;
    `read(runs) -> finding`, of their numbers by address (run/study.py, `summary`). Optional: `compared(finding)` and
    `frontier(finding)`, what the report draws; `chosen(finding, runs) -> address`, the run that is shown item by item."""

    rooms: ClassVar = ("studies",)
    must: ClassVar = ("plan", "read")


class Aide(Protocol):
    """A frozen helper by role: `ask(requests) -> answers`. A judge is asked {"prompt", "answer", "output", "row"}: is the
    output as good as the answer? -> bool."""

    rooms: ClassVar = ("aides",)
    must: ClassVar = ("ask", "role")
