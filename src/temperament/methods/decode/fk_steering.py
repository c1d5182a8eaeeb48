from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from temperament.engine.particles import Kind, Particles, Potential
from temperament.engine.tokens import Generated, Sampling, State, generate
from temperament.nn import draws
from temperament.parts import part
from temperament.protocols import Reward

APART = 1 << 40  # between the ids of a prompt's particles: the first one's draws are those of a plain completion


@part("decode.fk_steering", papers=["123"], modalities=("text",))
@dataclass(frozen=True)
class FKSteering:
    """Feynman-Kac steering of text: several continuations a prompt, weighed by a reward as they grow, the best copied.

        target  p(y | x) exp(strength r(x, y));  on the way  r_i = r(the text so far), every so many tokens

    Potentials diff, max, sum, their product and the last correction are those of pictures (engine/particles.py). A text that
    has ended keeps its last reward, may be copied over one that goes on, and may give way to one. Continuations are drawn, at
    `temperature` where the caller asks for the likeliest text. The best of each prompt is given (`give: draw`, one by its
    weight). every 0 is best-of-k. Source: Singhal et al. 2025 (paper 123)."""

    reward: Reward  # what a text is worth; one that needs no column of the rows
    particles: int = 4  # a prompt
    strength: float = 10.0  # of the reward, in the exponent
    potential: Kind = "max"  # diff: what was gained since; max: the best so far; sum: all so far
    every: int = 8  # tokens from one weighing to the next; 0: only at the end, best-of-k
    ess: float | None = None  # resample only where the effective number of particles is below this share; none: always
    start: float = 0.0  # the reward before the first time: the least there can be
    temperature: float = 1.0  # of the draws, where none is asked for
    give: Literal["best", "draw"] = "best"  # the best particle, or one by its weight

    def __post_init__(self):
        if self.particles < 1 or self.every < 0 or self.temperature <= 0:
            raise ValueError("particles is at least 1, every not negative, temperature above 0")
        if self.ess is not None and not 0 < self.ess <= 1:
            raise ValueError("ess lies in (0, 1]")

    def hooks(self, base: Any) -> list[Any]:
        return [_Words(base.tokenizer.decode)]

    @property
    def loop(self) -> Callable[..., Generated]:
        return partial(steered, self)


@dataclass(frozen=True)
class _Words:
    """How the loop, which knows ids only, reads what was written."""

    decode: Callable[[list[int]], str]


def steered(
    part: FKSteering,
    model: Any,
    prompts: list[list[int]] | dict[str, list[list[int]]],
    sampling: Sampling,
    *,
    seed: int = 0,
    step: int = 0,
    examples: Sequence[int] | None = None,
    forced: list[list[int]] | None = None,
    hooks: Sequence[Any] = (),
    decode: Callable[[list[int]], str] | None = None,
    batch: int = 64,
    **how: Any,
) -> Generated:
    """`engine.tokens.generate` with `particles` times the rows, of which one a prompt is given."""
    k = part.particles
    texts = prompts if isinstance(prompts, dict) else dict.fromkeys(model if isinstance(model, dict) else ("model",), prompts)
    first = next(iter(texts.values()))
    examples = list(range(len(first))) if examples is None else list(examples)
    words = next((h.decode for h in hooks if isinstance(h, _Words)), decode)
    steer = _Steer(part, first, examples, seed, step, words)
    many = lambda rows: [row for row in rows for _ in range(k)]
    sampling = sampling if sampling.temperature > 0 else replace(sampling, temperature=part.temperature)
    made = generate(
        model,
        {name: many(rows) for name, rows in texts.items()},
        sampling,
        seed=seed,
        step=step,
        examples=[e + APART * j for e in examples for j in range(k)],
        forced=None if forced is None else many(forced),
        hooks=[*(h for h in hooks if not isinstance(h, _Words)), steer],
        decode=words,
        batch=k * max(batch // k, 1),  # the particles of a prompt stay together
        **how,
    )
    rows = steer.chosen(made.ids)
    pick = lambda values: [values[i] for i in rows]
    kept = ("ids", "sampled", "logp", "sampling_logp", "finished")
    return replace(made, **{name: pick(getattr(made, name)) for name in kept})


class _Steer:
    """A hook of the token loop: one crowd of particles a batch."""

    def __init__(self, part: FKSteering, prompts: list[list[int]], examples: list[int], seed: int, step: int, decode: Any):
        self.part, self.prompts, self.examples, self.seed, self.turn, self.decode = part, prompts, examples, seed, step, decode
        self.crowds: dict[int, Particles] = {}  # by prompt

    def on_token(self, state: State) -> None:
        part, k = self.part, self.part.particles
        if k == 1 or part.every == 0 or (state.step + 1) % part.every:
            return
        written, moves = state.everything(), {}
        for group in dict.fromkeys(place // k for place in state.rows):  # of which one at least still goes on
            u = draws.uniform(self.seed, "fk_steering/resample", self.turn, torch.tensor([self.examples[group]])[:, None],
                              (state.step << 16) + torch.arange(k))  # fmt: skip
            rows = self._crowd(group).weigh(self._rewards(group, [written[group * k + j] for j in range(k)]), u)
            if rows is not None:
                moves |= {group * k + j: group * k + int(row) for j, row in enumerate(rows)}
        state.take(moves)

    def chosen(self, ids: list[list[int]]) -> list[int]:
        """The row of each prompt that is given, of finished texts."""
        k, found = self.part.particles, []
        for group, example in enumerate(self.examples):
            crowd = self._crowd(group)
            crowd.finish(self._rewards(group, ids[group * k : group * k + k]))
            u = draws.uniform(self.seed, "fk_steering/draw", self.turn, torch.tensor([example]))
            found.append(group * k + int(crowd.drawn(u) if self.part.give == "draw" else crowd.best()))
        return found

    def _crowd(self, group: int) -> Particles:
        part = self.part
        potential = Potential(part.potential, part.strength, part.start)
        return self.crowds.setdefault(group, Particles(potential, 1, part.particles, part.ess))

    def _rewards(self, group: int, texts: list[list[int]]) -> torch.Tensor:
        said = [self.decode(ids) for ids in texts]
        scores = self.part.reward.score(self.decode(self.prompts[group]), said, {})
        return torch.tensor([[float("nan") if s is None else float(s) for s in scores]])
