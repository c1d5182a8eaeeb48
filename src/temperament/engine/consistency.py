"""Consistency functions f(x_t, t), which lead from every noise level of one path to its clean end: pairs to train them on.

    s_1 < ... < s_N          levels(process, N): even in the 7th root, from the least noise to the most
    p_i, i = 1..N-1          chances(s, mean, spread): of the pair (s_i, s_i+1), as ln s were normal; or all alike
    N(k) = min(first * 2^floor(k / K'), last) + 1,   K' = floor(K / (log2 floor(last / first) + 1))        doubled, k of K steps
    d = sqrt(|u|^2 + c^2) - c                        pseudo-Huber, over a whole picture

Levels are s / a, noise over signal: x_t = a (x + sigma n). They so mean the same for every process; `process.at` gives the
time. Source: Song & Dhariwal 2023 (paper 007)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from temperament.engine.denoise import Denoiser, guided
from temperament.engine.noise import Process, karras
from temperament.nn import draws


def levels(process: Process, count: int) -> Tensor:
    """(count,) increasing, fp64, over all that the process has: its least noise is the boundary, from its most a sample starts
    (0.002 and 80 in the paper, and in diffusers' CMStochasticIterativeScheduler)."""
    return karras(*process.sigmas, count)


def chances(sigmas: Tensor, mean: float, spread: float | None) -> Tensor:
    """(N - 1,) fp64, sum 1."""
    if spread is None:
        return torch.full((len(sigmas) - 1,), 1 / (len(sigmas) - 1), dtype=torch.float64)
    below = torch.erf((sigmas.double().log() - mean) / (math.sqrt(2) * spread))
    return below.diff() / below.diff().sum()


def doubled(step: int, total: int, first: int, last: int) -> int:
    """How many levels at this step."""
    stretch = max(total // (int(math.log2(last // first)) + 1), 1)
    return min(first * 2 ** (step // stretch), last) + 1


def pseudo_huber(u: Tensor, c: float) -> Tensor:
    """u (rows, ...) -> (rows,); in fp64, where what is left of c near 0 is not rounding."""
    square = u.double().flatten(1).square().sum(1)
    return (square / ((square + c * c).sqrt() + c)).to(u.dtype)  # sqrt(q + c^2) - c, without the cancellation


@dataclass(frozen=True)
class Pair:
    """Two points of one path: the noisier at times `then`, the other at `now`; sigmas (rows,) fp64."""

    noisier: Tensor
    then: Tensor
    cleaner: Tensor
    now: Tensor
    apart: Tensor  # (rows,) difference of their levels


def pair(denoiser: Denoiser, x: Tensor, rows: Tensor, seed: int, sigmas: Tensor, chance: Tensor) -> Pair:
    """Clean x (rows, C, H, W) at two neighbouring levels, with one noise; level and noise are addressed by (seed, row)."""
    u = draws.uniform(seed, "consistency/level", 0, rows).double()
    i = torch.searchsorted(chance.cumsum(0)[:-1].contiguous(), u, right=True)
    n = draws.normal(seed, "consistency/noise", 0, rows, tuple(x.shape[1:])).to(x)
    low, high = sigmas[i].to(x.device), sigmas[i + 1].to(x.device)
    now, then = denoiser.process.at(low), denoiser.process.at(high)
    return Pair(_noised(denoiser.process, x, n, then), then, _noised(denoiser.process, x, n, now), now, high - low)


def led(teacher: Denoiser, two: Pair, conditions: dict[str, Tensor], nothing: dict[str, Tensor], guidance: float) -> Pair:
    """The same pair, its cleaner point where one step of DDIM leads a denoiser from the noisier one (consistency
    distillation). The teacher's estimate is guided; its network says what it said before it became a consistency function."""
    process = replace(teacher.process, boundary=False) if teacher.process.renoises else teacher.process
    said = guided(lambda x, t, c, version=None: teacher(x, t, c), lambda version: nothing, guidance)
    out = said(two.noisier, two.then, conditions)
    clean = process.clean(out, two.noisier, two.then)
    a, s = (_wide(v, clean) for v in process.scales(two.then))
    return replace(two, cleaner=_noised(process, clean, (two.noisier - a * clean) / s, two.now))


def _wide(v: Tensor, x: Tensor) -> Tensor:
    return v.to(x).view(-1, *(1 for _ in x.shape[1:]))


def _noised(process: Process, x: Tensor, n: Tensor, t: Tensor) -> Tensor:
    a, s = (_wide(v, x) for v in process.scales(t))
    return a * x + s * n
