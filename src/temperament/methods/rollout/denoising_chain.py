from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from temperament.engine import denoise
from temperament.engine.denoise import Chain, Denoiser
from temperament.engine.responses import ROUND
from temperament.errors import UserError
from temperament.nn.batch import Batch, Rollout
from temperament.parts import at, part
from temperament.protocols import PictureReward, Source


@part("rollout.denoising_chain", papers=["010"], modalities=("image",))
@dataclass(frozen=True)
class DenoisingChain:
    """Pictures painted by the model as it stands, every drawn step of the way a decision, and a reward at the end.

        state (x_t, t, caption);  decision x_t' ~ N(mean of the step, c^2);  its log-prob: the mean over the entries of x
        reward of the chain: (r - mean) / std of its caption's last rewards, cut at +-limit

    On a consistency model a step noises the estimate anew, c = s' (RLCM); on a diffusion model it is ancestral at eta 1 (DDPO).
    The last step is certain and no decision. Each step takes batch / group captions and paints `group` pictures of each; mean
    and std come from a memory of each caption's rewards, from the whole batch until it holds `least`, so that an easy caption
    teaches no more than a hard one. The memory is saved with a checkpoint. Trained by objectives.policy.ppo (critic: null,
    gamma: 1, beta: 0, clip: 1e-4) or grpo. Draws are addressed by (seed, step, picture). Sources: Oertell et al. 2024 (paper
    010); Black et al. 2023."""

    captions: Source  # what is asked: data.captions, or a source of pictures with captions
    rewards: list[PictureReward]  # what a picture is worth
    weights: list[float] = field(default_factory=list)  # one a reward; empty: all 1
    group: int = 4  # pictures of each caption
    steps: int = 8  # of the sampler
    eta: float = 1.0  # spread of the sampler of a diffusion model; a consistency model noises anew whatever it is
    guidance: float | None = None  # strength of the caption; none: as usual for the base
    normalise: bool = True  # rewards by caption, before the objective sees them; false: as they are
    memory: int = 32  # rewards of a caption that are remembered
    least: int = 16  # of which so many are needed for its own mean and std
    limit: float = 10.0  # a normalised reward is cut here

    yields: ClassVar = ("Rollout",)
    generates: ClassVar = True
    scheduled: ClassVar = ("weights",)

    def __post_init__(self):
        if not self.rewards or (self.weights and len(self.weights) != len(self.rewards)):
            raise ValueError("name at least one reward, and as many weights as rewards or none")
        if min(self.group, self.steps, self.least) < 1 or self.memory < self.least:
            raise ValueError("group, steps and least are at least 1, memory no less than least")
        if self.limit <= 0 or self.eta < 0:
            raise ValueError("limit is above 0, eta not negative")

    def open(self, ctx: Any) -> Stream:
        if ctx.batch % self.group:
            fitting = self.group * max(ctx.batch // self.group, 1)
            raise UserError("train.batch", ctx.batch, f"it must be a multiple of the group ({self.group}), e.g. {fitting}")
        return Stream(self, ctx)

    def suites(self) -> list[dict]:
        return self.captions.suites() if hasattr(self.captions, "suites") else []


class Stream:
    def __init__(self, spec: DenoisingChain, ctx: Any):
        self.spec, self.ctx = spec, ctx
        self.asked = spec.captions.open(replace(ctx, batch=ctx.batch // spec.group))
        self.steps_per_epoch = getattr(self.asked, "steps_per_epoch", None)
        self.denoiser = Denoiser.of(ctx.base)
        usual = denoise.Sampler.usual(self.denoiser.process)
        guidance = usual.guidance if spec.guidance is None else spec.guidance
        self.sampler = denoise.Sampler(spec.steps, spec.eta, guidance)
        self._must_decide()
        self.seen: dict[str, list[float]] = {}  # the last rewards of each caption
        self.told: dict[str, float] = {}

    def _must_decide(self) -> None:
        """A chain whose steps are all certain has no gradient; said now rather than after an hour."""
        times = self.denoiser.process.grid(self.spec.steps)
        x = torch.zeros(1, 1)
        spreads = [denoise.move(self.denoiser.process, x, x, a, b, self.spec.eta)[1] for a, b in pairwise(times)]
        if not any(spreads):
            mend = "no step of such a chain is drawn, so nothing could be learnt; take at least 2 steps"
            mend += "" if self.denoiser.process.renoises else " and an eta above 0"
            raise UserError("rollout.denoising_chain.steps", self.spec.steps, mend)

    def batch(self, step: int, progress: Any = None) -> Rollout:
        spec, ctx = at(self.spec, progress) if progress is not None else self.spec, self.ctx
        asked = self.asked.batch(step, progress)
        ids = (asked.examples[:, None] * spec.group + torch.arange(spec.group)).flatten()
        said = [c for c in self._captions(asked) for _ in range(spec.group)]
        view = ctx.live.view("live") if ctx.live is not None else ctx.base
        mine = range(ctx.world.rank, len(ids), ctx.world.size)
        rows: list[tuple[Tensor, ...]] = []
        for at_ in range(0, len(mine), ctx.micro):
            some = list(mine[at_ : at_ + ctx.micro])
            rows += self._painted(view, [said[i] for i in some], ids[some], 1 + step + ROUND * ctx.round)
        rows = ctx.world.gather_rows(rows, len(ids))
        before, decisions, weights, times, how, behaviour, pixels = zip(*rows, strict=True)
        chain = Chain(*(torch.stack(v) for v in (before, decisions, weights, times, how)), said)
        marks = self._marks(spec, torch.stack(pixels), said)
        self.told = {"reward": float(marks.mean())}
        rewards = self._normalised(marks.tolist(), said) if spec.normalise else marks
        return Rollout(chain, torch.stack(behaviour), rewards, torch.arange(len(ids)) // spec.group)

    def _captions(self, asked: Batch) -> list[str]:
        captions = getattr(asked, "captions", None)
        if captions is None:
            mend = "its rows have no captions; use data.captions, or pictures that are captioned"
            raise UserError("rollout.denoising_chain.captions", type(asked).__name__, mend)
        return captions

    def _painted(self, view: Any, captions: list[str], ids: Tensor, draw: int) -> list[tuple[Tensor, ...]]:
        with self.ctx.world.autocast():
            made = denoise.denoise(view, captions, self.sampler, seed=self.ctx.seed, draw=draw, ids=ids, record=True)
        chain = made.chain
        columns = chain.before, chain.decisions, chain.weights, chain.times, chain.how, made.logp, made.pixels.float().cpu()
        return list(zip(*(c.unbind(0) for c in columns), strict=True))

    @torch.no_grad()
    def _marks(self, spec: DenoisingChain, pixels: Tensor, captions: Sequence[str]) -> Tensor:
        weights = spec.weights or [1.0] * len(spec.rewards)
        marks = [w * r.value(pixels, captions).float().cpu() for w, r in zip(weights, spec.rewards, strict=True)]
        return torch.stack(marks).sum(0)

    def _normalised(self, marks: Sequence[float], captions: Sequence[str]) -> Tensor:
        for caption, mark in zip(captions, marks, strict=True):
            self.seen[caption] = [*self.seen.get(caption, ()), mark][-self.spec.memory :]
        out = []
        for caption, mark in zip(captions, marks, strict=True):
            own = self.seen[caption]
            known = torch.tensor(own if len(own) >= self.spec.least else list(marks), dtype=torch.float64)
            out.append(float((mark - known.mean()) / (known.std(correction=0) + 1e-6)))
        return torch.tensor(out, dtype=torch.float32).clamp(-self.spec.limit, self.spec.limit)

    def largest(self) -> Rollout:
        rows, T = self.ctx.batch, self.spec.steps
        asked = self._captions(self.asked.largest() if hasattr(self.asked, "largest") else self.asked.batch(0))
        said = [c for c in asked for _ in range(self.spec.group)]
        x, along = torch.zeros(rows, T, *self.denoiser.shape), torch.zeros(rows, T)
        times = self.denoiser.process.grid(T)
        pairs = torch.stack([times[:-1], times[1:]], -1).float().expand(rows, -1, -1)
        how = torch.tensor([self.sampler.eta, self.sampler.guidance]).expand(rows, T, -1)
        chain = Chain(x, x, along + (torch.arange(T) < T - 1), pairs, how, said)
        return Rollout(chain, along, along[:, 0], torch.arange(rows) // self.spec.group)

    def feedback(self, batches: list, row: dict) -> dict[str, float]:
        return self.told

    def state_dict(self) -> dict[str, Any]:
        inner = self.asked.state_dict() if hasattr(self.asked, "state_dict") else {}
        return {"tensors": inner.get("tensors", {}), "json": {"seen": self.seen, "asked": inner.get("json")}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = {c: list(v) for c, v in state["json"]["seen"].items()}
        if hasattr(self.asked, "load_state_dict"):
            self.asked.load_state_dict({"tensors": state["tensors"], "json": state["json"]["asked"]})
