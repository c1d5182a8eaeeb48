"""Particles: several drafts of one answer, weighed on the way, the heavy copied over the light (Feynman-Kac steering).

    crowd = Particles(Potential("max", 10.0), groups=2, each=4)
    rows = crowd.weigh(rewards, u)          rewards (2, 4) of the drafts as they stand -> rows to go on with, or None
    crowd.finish(rewards)                   of what they have become; then crowd.best() or crowd.drawn(u)

The target is p(x) exp(strength r(x)). A potential G says how much a draft's prospects are worth at a moment; r_i its reward
there, r_0 = `start`:

    diff   G = exp(strength (r_i - r_{i-1}))                    what it gained: the product telescopes
    max    G = exp(strength max(r_0 .. r_i))                    the best it ever promised
    sum    G = exp(strength (r_0 + ... + r_i))                  its promise all along

Weights multiply from one resampling to the next; after one they are equal again. What a draft's lineage was given before is
taken back at the end, G_end = exp(strength (r(x) - start)) / (product of its potentials), so that the product over any lineage
is exp(strength (r(x) - start)): weighted at the end, drafts are draws of the target, whatever the potentials in between. A
draft without a finite reward weighs nothing; where all of a group weigh nothing, none is preferred.
Source: Singhal et al. 2025 (paper 123); unlike its code, weights of moments without resampling are kept, and the last potential
is of r(x), not of the best on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from temperament.nn.logprobs import inverse_cdf

Kind = Literal["diff", "max", "sum"]


@dataclass(frozen=True)
class Potential:
    kind: Kind = "max"
    strength: float = 10.0
    start: float = 0.0  # the reward before the first moment: the least there can be

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(f"potential must be one of {', '.join(get_args(Kind))}")

    def log(self, reward: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(log G, the memory after it), of rewards and the memory of those before."""
        if self.kind == "diff":
            return self.strength * (reward - memory), reward
        memory = torch.maximum(reward, memory) if self.kind == "max" else memory + reward
        return self.strength * memory, memory


class Particles:
    """`groups` answers of `each` drafts; row i of group g is row g * each + i of whatever they are drafts of. All in fp64."""

    def __init__(self, potential: Potential, groups: int, each: int, ess: float | None = None):
        """ess: resample only where the effective number of drafts, 1 / sum w^2, is below this share of them."""
        self.potential, self.shape, self.ess = potential, (groups, each), ess
        self.memory = torch.full(self.shape, potential.start, dtype=torch.float64)
        self.weight = torch.zeros(self.shape, dtype=torch.float64)  # log, since the last resampling
        self.given = torch.zeros(self.shape, dtype=torch.float64)  # log of all potentials of the lineage
        self.last: Tensor | None = None  # rewards at the end

    def weigh(self, rewards: Tensor, u: Tensor) -> Tensor | None:
        """rewards (groups, each) and u (groups, each) uniform in [0, 1) -> (groups * each,) rows to go on with, in place of
        those that stand there; None: all as they are."""
        rewards, alive = self._read(rewards)
        log, memory = self.potential.log(rewards, self.memory)
        self.memory = torch.where(alive, memory, self.memory)
        self._add(torch.where(alive, log, -torch.inf))
        thin = self._thin()
        if not bool(thin.any()):
            return None
        groups, each = self.shape
        stay = torch.arange(each).expand(groups, each)
        cumulative = self.share().cumsum(-1)
        chosen = torch.searchsorted(cumulative / cumulative[:, -1:], u.double().cpu().contiguous(), right=True)
        chosen = torch.where(thin[:, None], chosen.clamp(max=each - 1), stay)
        self.memory, self.given = self.memory.gather(1, chosen), self.given.gather(1, chosen)
        self.weight = torch.where(thin[:, None], 0.0, self.weight)
        return (chosen + each * torch.arange(groups)[:, None]).flatten()

    def finish(self, rewards: Tensor) -> None:
        rewards, alive = self._read(rewards)
        log = self.potential.strength * (rewards - self.potential.start) - self.given
        self._add(torch.where(alive, log, -torch.inf))
        self.last = torch.where(alive, rewards, -torch.inf)

    def best(self) -> Tensor:
        """(groups,) rows: of each group the draft with the highest reward."""
        return self._rows(self.last.argmax(1))

    def drawn(self, u: Tensor) -> Tensor:
        """(groups,) rows: of each group one draft, by its weight; u (groups,)."""
        return self._rows(inverse_cdf(self.share(), u.double().cpu()))

    def share(self) -> Tensor:
        """(groups, each): weights that sum to 1."""
        return torch.softmax(self.weight, -1)

    def _rows(self, chosen: Tensor) -> Tensor:
        return chosen + self.shape[1] * torch.arange(self.shape[0])

    def _read(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        rewards = rewards.detach().double().cpu().view(self.shape)
        alive = rewards.isfinite()
        return torch.where(alive, rewards, 0.0), alive

    def _add(self, log: Tensor) -> None:
        weight = self.weight + log
        lost = (weight == -torch.inf).all(1, keepdim=True)  # nothing to prefer one by
        self.weight = torch.where(lost, 0.0, weight)
        self.given = self.given + torch.where(lost | (log == -torch.inf), 0.0, log)

    def _thin(self) -> Tensor:
        """(groups,): where to resample."""
        if self.ess is None:
            return torch.ones(self.shape[0], dtype=torch.bool)
        return 1 / self.share().square().sum(1) < self.ess * self.shape[1]


def moments(times: int, first: float, last: float, steps: int) -> list[int]:
    """At which of `steps` steps to weigh: `times` of them, evenly from one share of the way to another."""
    if times == 0:
        return []
    at = torch.linspace(first, last, times) if times > 1 else torch.tensor([(first + last) / 2])
    return sorted({min(round(float(share) * steps), steps - 1) for share in at})
