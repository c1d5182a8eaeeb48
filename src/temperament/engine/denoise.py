"""Denoising: noise processes, the network's call, and the one loop that samples.

    x_t = a(t) x + s(t) n                       every process is these two scales, and what its network says of x_t
    x' = a' x^ + sqrt(s'^2 - c^2) n^ + c z      every sampler is this one step, from t to t', x^ and n^ the network's estimates

    c = 0                                       DDIM; for a flow, Euler's method: the same numbers
    c = eta s' sqrt(1 - (a s' / (a' s))^2)      the posterior's spread: eta 1 is ancestral sampling
    c = s', without the middle                  noised anew: multistep consistency sampling

    denoiser = Denoiser.of(base)                or of a view, or of a network whose base was used before
    made = denoise(denoiser, ["a red cross on navy"], Sampler(steps=20, guidance=3.0), seed=0)
    made.pixels                                 (rows, 3, H, W) in 0..1

Parts of the room `sample` hook into the loop by events (`Hook`). Every draw is addressed by (seed, step, row's id), so a row
is painted alike in any company. Sources: Song et al. 2021 (DDIM), Lipman et al. 2023 (flow matching), Song et al. 2023
(consistency models), Ho & Salimans 2022 (guidance)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from temperament.engine.noise import Process, process_of
from temperament.errors import UserError
from temperament.nn import draws
from temperament.nn.batch import Images, Timed
from temperament.nn.context import checkpoint as recomputed
from temperament.nn.context import context, current
from temperament.nn.forward import active, arguments

Predict = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]


# ---- the network -----------------------------------------------------------------------------------------------------------


class Denoiser:
    """A denoising network with what it reads and how its pictures are noised. `version`: the view it is called as."""

    _bases: WeakKeyDictionary = WeakKeyDictionary()  # network -> its base

    def __init__(self, base: Any, version: Any = None):
        if "denoiser" not in base.components:
            raise UserError("base", base.id, "it makes no pictures; use a diffusion base, e.g. lab/unet or lab/flow")
        self.base, self.version = base, version
        self.network, known = base.components["denoiser"], base.processors
        self.process: Process = known.get("process") or known.setdefault("process", process_of(known["scheduler"]))
        Denoiser._bases[self.network] = ref(base)

    @classmethod
    def of(cls, model: Any) -> Denoiser:
        """From a base, a view of one, or the network of a base that was a denoiser before."""
        if isinstance(model, Denoiser):
            return model
        if hasattr(model, "components"):
            return cls(model)
        holder = getattr(model, "holder", None) or getattr(model, "base", None)
        if holder is not None:
            return cls(getattr(holder, "base", holder), model)
        base = cls._bases[model]()
        assert base is not None, "the base of this network is gone"
        return cls(base)

    def active(self):
        """The context in which the base's modules are this version."""
        return active(self.version) if self.version is not None else nullcontext()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the network reads of captions, as its arguments: hidden states of the text encoder, and a pooled one."""
        encoder, tokenizer = self.base.components.get("text_encoder"), self.base.processors.get("tokenizer")
        if encoder is None or tokenizer is None:
            return {}
        length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        ids = tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        out = encoder(ids["input_ids"].to(self.device))
        read = {"encoder_hidden_states": out.last_hidden_state}
        if "pooled_projections" in _arguments(self.network):
            pooled = out.text_embeds if getattr(out, "text_embeds", None) is not None else out.pooler_output
            read["pooled_projections"] = pooled
        return read

    def __call__(self, x: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """The network's output at noised x (rows, C, H, W) and times t (rows,)."""
        first = "hidden_states" if "hidden_states" in _arguments(self.network) else "sample"
        given = self.process.given(x, t)
        with self.active():
            out = self.network(**{first: given}, timestep=self.process.asked(t), **conditions, return_dict=False)[0]
        return out[:, : x.shape[1]]

    def clean(self, x: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """The network's estimate of the picture under x_t."""
        return self.process.clean(self(x, t, conditions), x, t)

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels in 0..1 -> what is noised: themselves in -1..1, or the codec's (mean) latents."""
        codec, x = self.base.components.get("codec"), 2 * pixels - 1
        if codec is None:
            return x
        shift = getattr(codec.config, "shift_factor", None) or 0.0
        with torch.no_grad():
            return (codec.encode(x).latent_dist.mean - shift) * codec.config.scaling_factor

    def pixels(self, latents: Tensor) -> Tensor:
        """The way back, not cut to 0..1: a reward may want the gradient beyond."""
        codec = self.base.components.get("codec")
        if codec is not None:
            shift = getattr(codec.config, "shift_factor", None) or 0.0
            latents = codec.decode(latents / codec.config.scaling_factor + shift, return_dict=False)[0]
        return (latents + 1) / 2

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is noised."""
        config = self.network.config
        side = config.sample_size
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        return config.in_channels, height, width


def _arguments(network: Any) -> frozenset[str]:
    return arguments(type(network).forward)


@dataclass(frozen=True)
class Covered:
    """Rows under noise: x (rows, C, H, W) at times t (rows,), what the network should say of them, and the noise itself."""

    x: Tensor
    t: Tensor
    target: Tensor
    noise: Tensor
    captions: list[str]


def covered(denoiser: Denoiser, batch: Images, seed: int, silent: float = 0.0) -> Covered:
    """Pictures covered with noise for training; noise, time and whether the caption is said are addressed by (seed, row)."""
    x = denoiser.latents(batch.pixels.to(denoiser.device))
    one = lambda purpose: draws.uniform(seed, f"denoise/{purpose}", 0, batch.examples).to(x.device)
    n = draws.normal(seed, "denoise/noise", 0, batch.examples, tuple(x.shape[1:])).to(x)
    t = denoiser.process.times(one("time"))
    a, s = (v.to(x).view(-1, 1, 1, 1) for v in denoiser.process.scales(t))
    return Covered(a * x + s * n, t, denoiser.process.target(x, n, t), n, unsaid(batch, silent, seed))


def unsaid(batch: Images, share: float, seed: int) -> list[str]:
    """The captions of a batch, this share of them left out; which is addressed by (seed, row)."""
    captions = batch.captions or [""] * len(batch)
    if not share:
        return captions
    quiet = (draws.uniform(seed, "denoise/unsaid", 0, batch.examples) < share).tolist()
    return ["" if q else c for q, c in zip(quiet, captions, strict=True)]


def addressed(rows: Tensor) -> AbstractContextManager:
    """Inside, modules that draw (dropout) draw by these row ids; only a training step has an address. Two passes over the same
    rows in one step so meet the same dropout."""
    address = current().draws
    return nullcontext() if address is None else context(draws=replace(address, examples=rows))


# ---- the loop --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampler:
    """How pictures are made. steps: calls of the network (twice, where guided). eta: 0 certain, 1 ancestral; a consistency
    model always noises anew. guidance: strength of the caption, 1 plain; the estimate is u + guidance (c - u), u without the
    caption."""

    steps: int = 20
    eta: float = 0.0
    guidance: float = 3.0

    @classmethod
    def usual(cls, process: Process) -> Sampler:
        return cls(4, 0.0, 1.0) if process.renoises else cls()


@dataclass
class State:
    """Where the loop stands; hooks may change what they like, `sampler` (but for its steps) when they begin. time, then: of
    this step, (); clean: the estimate x^ of it; before: what it began from, mean and spread: what x was drawn from. placed:
    was the start given rather than drawn? trail: of the steps so far, where they are recorded, (before, x, log-density of x as
    it was drawn (rows,), or None where it was certain)."""

    denoiser: Denoiser
    x: Tensor
    captions: list[str]
    ids: Tensor
    conditions: dict[str, Tensor]
    times: Tensor
    seed: int
    draw: int
    sampler: Sampler
    placed: bool = False
    step: int = 0
    clean: Tensor | None = None
    before: Tensor | None = None
    mean: Tensor | None = None
    spread: float = 0.0
    trail: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    _read: dict[tuple, tuple[Any, dict[str, Tensor]]] = field(default_factory=dict)

    @property
    def time(self) -> Tensor:
        return self.times[self.step]

    @property
    def then(self) -> Tensor:
        return self.times[self.step + 1]

    def noise(self, purpose: str) -> Tensor:
        """Normal draws like x, addressed by (seed, purpose, draw, row's id)."""
        return draws.normal(self.seed, f"denoise/{purpose}", self.draw, self.ids, tuple(self.x.shape[1:])).to(self.x)

    def read(self, version: Any = None, captions: Sequence[str] | None = None) -> dict[str, Tensor]:
        """What a version of the model reads of these captions, by default those of the rows."""
        captions = tuple(self.captions if captions is None else captions)
        if (id(version), captions) not in self._read:
            reader = self.denoiser if version is None else Denoiser(self.denoiser.base, version)
            with reader.active():
                self._read[id(version), captions] = version, reader.encode(captions)
        return self._read[id(version), captions][1]

    def select(self, rows: Tensor) -> None:
        """These rows of all that is row by row, in this order: repeated or left out at will. Their ids, which address draws,
        stay with the places; give them anew where the number of rows changes."""
        take = lambda v: v[rows.to(v.device)] if isinstance(v, Tensor) else v
        self.x, self.clean, self.before, self.mean = map(take, (self.x, self.clean, self.before, self.mean))
        self.captions = [self.captions[i] for i in rows.tolist()]
        self.conditions = {k: take(v) for k, v in self.conditions.items()}
        self.trail = [tuple(map(take, step)) for step in self.trail]


class Hook:
    """What a part of the room `sample` may do, by event. Inherit what is not needed.

    begin(state)        before the first step: more rows, another start
    around(predict)     what is called instead of the network: predict(x, t, conditions, version=None) -> output;
                        version: a view to call it as. The hooks of a recipe wrap in their order, guidance innermost
    estimated(state)    state.clean is known, the step not yet taken
    stepped(state)      state.x is the new one
    end(state)          after the last step"""

    def begin(self, state: State) -> None: ...
    def around(self, predict: Callable) -> Callable:
        return predict

    def estimated(self, state: State) -> None: ...
    def stepped(self, state: State) -> None: ...
    def end(self, state: State) -> None: ...


@dataclass
class Chain(Timed):
    """Steps of denoising as decisions. before, decisions (rows, T, C, H, W): what was there, and what the step made of it;
    weights (rows, T): 1 where the step was drawn, 0 where it was certain. times (rows, T, 2): from where to where it went.
    how (rows, T, 2): eta and guidance of the sampler, the same for all rows. captions: what each row was asked to be."""

    before: Tensor
    decisions: Tensor
    weights: Tensor
    times: Tensor
    how: Tensor
    captions: list[str]

    def logp(self, model: Any) -> Tensor:
        return logp(model, self)


@dataclass(frozen=True)
class Made:
    pixels: Tensor  # (rows, 3, H, W) in 0..1, not cut where gradients are kept
    latents: Tensor
    chain: Chain | None = None  # the steps as decisions, where they were recorded
    logp: Tensor | None = None  # (rows, T): how likely each was, as `logp` has it


def guided(predict: Callable, nothing: Callable[[Any], dict[str, Tensor]], scale: float) -> Callable:
    """u + scale (c - u): both in one call of twice the rows. nothing: what a version reads of no caption."""
    if scale == 1:
        return predict

    def both(x: Tensor, t: Tensor, conditions: dict[str, Tensor], version: Any = None) -> Tensor:
        if not conditions:
            return predict(x, t, conditions, version)
        unread = nothing(version)
        cond = {k: torch.cat([v, unread[k].expand_as(v)]) for k, v in conditions.items()}
        said, unsaid = predict(torch.cat([x, x]), torch.cat([t, t]), cond, version).chunk(2)
        return unsaid + scale * (said - unsaid)

    return both


def denoise(
    model: Any,
    captions: Sequence[str],
    sampler: Sampler | None = None,
    *,
    seed: int = 0,
    draw: int = 0,
    ids: Tensor | None = None,
    start: Tensor | None = None,
    hooks: Sequence[Hook] = (),
    keep: int = 0,
    checkpoint: bool = False,
    record: bool = False,
) -> Made:
    """Pictures of captions. draw: which draw of the seed; ids (rows,): address of each row's noise, by default 0, 1, 2...
    start: the first x instead of noise. keep: how many of the last steps keep their graph for a gradient; checkpoint: those
    recompute their activations. record: also the chain of decisions. Nothing is dropped out here."""
    denoiser = Denoiser.of(model)
    process, sampler = denoiser.process, sampler or Sampler.usual(denoiser.process)
    ids = torch.arange(len(captions)) if ids is None else ids
    times = process.grid(sampler.steps).to(denoiser.device)
    with denoiser.active(), context(draws=None):
        state = State(denoiser, torch.empty(len(ids), *denoiser.shape, device=denoiser.device), list(captions), ids, {}, times,
                      seed, draw, sampler, start is not None)  # fmt: skip
        with torch.set_grad_enabled(keep > 0):
            state.conditions = state.read()
        state.x = process.start(state.noise("start")) if start is None else start.to(denoiser.device)
        for hook in hooks:
            hook.begin(state)
        if state.sampler.guidance != 1:
            with torch.set_grad_enabled(keep > 0):
                state.read(captions=[""])

        def call(x: Tensor, t: Tensor, conditions: dict[str, Tensor], version: Any = None) -> Tensor:
            one = denoiser if version is None else Denoiser(denoiser.base, version)
            if checkpoint and torch.is_grad_enabled():
                return recomputed(one, x, t, conditions)
            return one(x, t, conditions)

        predict = guided(call, lambda version: state.read(version, [""]), state.sampler.guidance)
        for hook in hooks:
            predict = hook.around(predict)
        for state.step in range(sampler.steps):
            with torch.set_grad_enabled(state.step >= sampler.steps - keep):
                _step(state, predict, hooks)
            if record:
                drawn = density(state.x, state.mean, state.spread).detach() if state.spread > 0 else None
                state.trail.append((state.before.detach(), state.x.detach(), drawn))
    for hook in hooks:
        hook.end(state)
    with torch.set_grad_enabled(keep > 0), denoiser.active(), context(draws=None):
        # A codec's activations at full size are the largest of all.
        through = checkpoint and keep > 0 and "codec" in denoiser.base.components
        pixels = recomputed(denoiser.pixels, state.x) if through else denoiser.pixels(state.x)
    return Made(pixels if keep else pixels.clamp(0, 1), state.x, *(_recorded(state) if record else ()))


def _step(state: State, predict: Callable, hooks: Sequence[Hook]) -> None:
    process, x = state.denoiser.process, state.x if torch.is_grad_enabled() else state.x.detach()
    state.before = x
    now = state.time.expand(len(x))
    state.clean = process.clean(predict(x, now, state.conditions), x, now)
    for hook in hooks:
        hook.estimated(state)
    state.mean, state.spread = move(process, state.before, state.clean, state.time, state.then, state.sampler.eta)
    state.x = state.mean + state.spread * state.noise(f"step/{state.step}") if state.spread > 0 else state.mean
    for hook in hooks:
        hook.stepped(state)


def move(process: Process, x: Tensor, clean: Tensor, time: Tensor, then: Tensor, eta: float) -> tuple[Tensor, float]:
    """Mean and spread of x at the time `then`, from x at `time` and the estimate under it. Times are numbers, ()."""
    (a, s), (a2, s2) = ([float(v) for v in process.scales(t)] for t in (time, then))
    if s2 <= process.floor * (1 + 1e-6):  # (a scale is of fp32)
        return a2 * clean, 0.0
    kept = 0.0 if a == 0 else a * s2 / (a2 * s)
    if process.renoises:
        return a2 * clean, math.sqrt(max(s2 * s2 - process.floor**2, 0.0))
    c = eta * s2 * math.sqrt(max(1 - kept * kept, 0.0))
    certain = math.sqrt(max(s2 * s2 - c * c, 0.0))
    return a2 * clean + (certain * (x - a * clean) / s if certain else 0.0), c


# ---- the way back ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def invert(
    model: Any,
    latents: Tensor,
    captions: Sequence[str] | None = None,
    steps: int = 50,
    *,
    refine: int = 0,
    tell: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """The start from which certain sampling (eta 0, guidance 1) of so many steps makes these latents (rows, C, H, W).

    Each step x' = A x + B x^(x, t) is undone with the network asked, at its noisier time t, about the x' at hand (DDIM
    inversion, as in diffusers); `refine` more times about the x that was found, which converges to the exact inverse.
    captions: default none. tell(step): the number of the step in sampling that is about to be undone."""
    denoiser = Denoiser.of(model)
    process, x = denoiser.process, latents.to(denoiser.device)
    if process.renoises:
        mend = "a consistency model forgets the noise it began from; use one of diffusion or flow"
        raise UserError("base", denoiser.base.id, mend)
    times = process.grid(steps).to(denoiser.device)
    with denoiser.active(), context(draws=None):
        conditions = denoiser.encode([""] * len(x) if captions is None else captions)
        for step in reversed(range(steps)):
            tell(step)
            x = _undone(denoiser, x, times[step], times[step + 1], conditions, refine)
    return x


def _undone(
    denoiser: Denoiser, after: Tensor, time: Tensor, then: Tensor, conditions: dict[str, Tensor], refine: int
) -> Tensor:
    """x before the step that led from `time` to `then`. The estimate is affine, x^ = c x + d out, so is the step."""
    process, now = denoiser.process, time.expand(len(after))
    (a, s), (a2, s2) = ([float(v) for v in process.scales(t)] for t in (time, then))
    one, none = torch.ones(1, 1, 1, 1, device=after.device), torch.zeros(1, 1, 1, 1, device=after.device)
    c, d = float(process.clean(none, one, time[None])), float(process.clean(one, none, time[None]))
    says_picture = c == 0  # such a network is read as one that says the noise
    slope, gain = (a2 / a, s2 - a2 * s / a) if says_picture else (s2 / s + (a2 - s2 * a / s) * c, (a2 - s2 * a / s) * d)
    x = after
    for _ in range(refine + 1):
        out = denoiser(x, now, conditions)
        x = (after - gain * ((x - a * out) / s if says_picture else out)) / slope
    return x


# ---- chains as decisions ---------------------------------------------------------------------------------------------------


def _recorded(state: State) -> tuple[Chain, Tensor]:
    """The chain, and how likely each of its steps was."""
    before, after = (torch.stack([step[i] for step in state.trail], 1).cpu() for i in (0, 1))
    rows, alike = len(before), lambda v: v.float().cpu().expand(len(before), *v.shape).clone()
    nothing = torch.zeros(rows, device=state.x.device)
    found = torch.stack([nothing if step[2] is None else step[2] for step in state.trail], 1).cpu()
    weights = alike(torch.tensor([float(step[2] is not None) for step in state.trail]))
    how = alike(torch.tensor([state.sampler.eta, state.sampler.guidance]).expand(len(state.trail), -1))
    times = alike(torch.stack([state.times[:-1], state.times[1:]], -1))
    return Chain(before, after, weights, times, how, list(state.captions)), found


def density(x: Tensor, mean: Tensor, spread: float) -> Tensor:
    """(rows,): Gaussian log-density, the mean over the entries of x (as DDPO and RLCM take it: a ratio of pictures of any size
    is then of one scale)."""
    z = (x - mean) / spread
    return (-0.5 * z.square() - math.log(spread) - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def logp(model: Any, chain: Chain) -> Tensor:
    """(rows, T): log-density of each recorded step under the model (`density`), sampled as the chain was; 0 where the step was
    certain. Nothing is dropped out, as nothing was when it was sampled."""
    denoiser = Denoiser.of(model)
    eta, guidance = chain.how[0, 0].tolist()
    with denoiser.active(), context(draws=None):
        conditions = denoiser.encode(chain.captions)
        nothing = denoiser.encode([""]) if guidance != 1 else {}
        predict = guided(lambda x, t, c, version=None: denoiser(x, t, c), lambda version: nothing, guidance)
        found = []
        for i in range(chain.before.shape[1]):
            x, time, then = chain.before[:, i], chain.times[0, i, 0], chain.times[0, i, 1]
            now = time.expand(len(x))
            if bool((chain.weights[:, i] == 0).all()):
                found.append(torch.zeros(len(x), device=x.device))
                continue
            clean = denoiser.process.clean(predict(x, now, conditions), x, now)
            mean, spread = move(denoiser.process, x, clean, time, then, eta)
            found.append(density(chain.decisions[:, i], mean, spread) if spread > 0 else torch.zeros(len(x), device=x.device))
    return torch.stack(found, 1)
