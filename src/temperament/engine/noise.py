"""Noise processes: how a picture is covered with noise, and what a network that was trained on them says.

    x_t = a(t) x + s(t) n,   n ~ N(0, 1);   t in the process's own unit, a tensor (rows,) or a number ()

    process.scales(t)           (a, s)
    process.clean(out, x, t)    the estimate of x in what the network said of x_t
    process.target(x, n, t)     what it should say
    process.given(x_t, t)       what it is given, and asked(t): the number it takes for the time
    process.times(u)            training times for u uniform in 0..1 (rows,)
    process.at(sigma)           the time at which s / a is sigma, (rows,); process.sigmas: the least and the most it has
    process.grid(steps)         (steps + 1,) decreasing, the last one clean

Which one a base has is read from its scheduler's configuration, as diffusers writes it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from temperament.errors import UserError


class Process(Protocol):
    renoises: bool  # is the network a consistency function, and noised anew at each step?
    floor: float  # noise left in what it calls clean, where it renoises

    @property
    def sigmas(self) -> tuple[float, float]: ...

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]: ...
    def clean(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor: ...
    def target(self, x: Tensor, n: Tensor, t: Tensor) -> Tensor: ...
    def given(self, x: Tensor, t: Tensor) -> Tensor: ...
    def asked(self, t: Tensor) -> Tensor: ...
    def times(self, u: Tensor) -> Tensor: ...
    def at(self, sigma: Tensor) -> Tensor: ...
    def grid(self, steps: int) -> Tensor: ...
    def start(self, noise: Tensor) -> Tensor: ...


def share(process: Process, t: Tensor) -> Tensor:
    """(rows,): what an error of 1 in what the network says makes in the picture, whose estimate is affine in it.

    epsilon -s / a; v_prediction -s; sample 1; flow -t; EDM c_out."""
    one = torch.ones(len(t), 1, 1, 1, dtype=torch.float64, device=t.device)
    return process.clean(one, torch.zeros_like(one), t).flatten()


def _wide(v: Tensor, x: Tensor) -> Tensor:
    """(rows,) beside (rows, C, H, W), in its precision."""
    return v.to(x).view(-1, *(1 for _ in x.shape[1:]))


@dataclass(frozen=True)
class Diffusion:
    """Variance preserving: a^2 + s^2 = 1, a^2 the running product of 1 - beta. Times 0..T-1; -1 is clean.

    predicts: epsilon n; v_prediction a n - s x; sample x. Between whole times log(s/a) is interpolated. boundary: the network
    is a consistency function f = c_skip x_t + c_out x^(x_t), with c_skip 1 and c_out 0 at time 0 (latent consistency models:
    sigma_data 0.5, time scaled by 10)."""

    betas: tuple[float, ...]
    predicts: str = "epsilon"
    boundary: bool = False
    clean_end: bool = True  # is the end of the chain without noise, or at time 0?
    floor: ClassVar = 0.0

    @property
    def renoises(self) -> bool:
        return self.boundary

    @property
    def sigmas(self) -> tuple[float, float]:
        return float(self._log_ratio[0].exp()), float(self._log_ratio[-1].exp())

    @cached_property
    def _log_ratio(self) -> Tensor:
        kept = torch.cumprod(1 - torch.tensor(self.betas, dtype=torch.float64), 0)
        return 0.5 * (torch.log1p(-kept) - torch.log(kept))

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t, table = torch.as_tensor(t), self._log_ratio.to(torch.as_tensor(t).device)
        at = t.double().clamp(0, len(table) - 1)
        low = at.floor().long()
        ratio = torch.lerp(table[low], table[(low + 1).clamp(max=len(table) - 1)], at - low)
        clean = t < 0 if self.clean_end else torch.zeros_like(t, dtype=torch.bool)
        a, s = torch.sigmoid(-2 * ratio).sqrt(), torch.sigmoid(2 * ratio).sqrt()
        return torch.where(clean, 1.0, a).float(), torch.where(clean, 0.0, s).float()

    def at(self, sigma: Tensor) -> Tensor:
        """The (fractional) time at which s / a is sigma."""
        table, wanted = self._log_ratio.to(sigma.device), torch.log(sigma.double())
        high = torch.searchsorted(table, wanted).clamp(1, len(table) - 1)
        share = (wanted - table[high - 1]) / (table[high] - table[high - 1])
        return high - 1 + share.clamp(0, 1)  # in fp64: float32 would move the noise by 1e-5 of itself

    def clean(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        a, s = (_wide(v, x) for v in self.scales(t))
        estimate = (
            out if self.predicts == "sample" else a * x - s * out if self.predicts == "v_prediction" else (x - s * out) / a
        )
        if not self.boundary:
            return estimate
        scaled = 10.0 * _wide(t, x)
        return estimate * (scaled / (scaled.square() + 0.25).sqrt()) + x * (0.25 / (scaled.square() + 0.25))

    def target(self, x: Tensor, n: Tensor, t: Tensor) -> Tensor:
        a, s = (_wide(v, x) for v in self.scales(t))
        return {"epsilon": lambda: n, "v_prediction": lambda: a * n - s * x, "sample": lambda: x}[self.predicts]()

    def given(self, x: Tensor, t: Tensor) -> Tensor:
        return x

    def asked(self, t: Tensor) -> Tensor:
        return t.float()

    def times(self, u: Tensor) -> Tensor:
        return (u * len(self.betas)).floor()

    def grid(self, steps: int) -> Tensor:
        """Evenly spaced from the noisiest time (diffusers' "trailing")."""
        T = len(self.betas)
        return torch.cat([(T - 1 - torch.arange(steps) * (T / steps)).round(), torch.tensor([-1.0])])

    def start(self, noise: Tensor) -> Tensor:
        return noise


@dataclass(frozen=True)
class Flow:
    """A straight way from picture to noise: a = 1 - t, s = t, the network says n - x. Times 0..1; 0 is clean.

    shift: t' = shift t / (1 + (shift - 1) t) in sampling, more steps where there is much noise. Training times are
    logit-normal (Esser et al. 2024)."""

    shift: float = 1.0
    scale: float = 1000.0  # of the number the network takes for the time
    renoises: bool = False
    floor: ClassVar = 0.0
    sigmas: ClassVar = (1e-3, 1e3)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(t)
        return 1 - t, t

    def clean(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return x - _wide(t, x) * out

    def target(self, x: Tensor, n: Tensor, t: Tensor) -> Tensor:
        return n - x

    def given(self, x: Tensor, t: Tensor) -> Tensor:
        return x

    def asked(self, t: Tensor) -> Tensor:
        return self.scale * t

    def times(self, u: Tensor) -> Tensor:
        return torch.sigmoid(torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6))).float()

    def at(self, sigma: Tensor) -> Tensor:
        return sigma / (1 + sigma)

    def grid(self, steps: int) -> Tensor:
        t = torch.linspace(1, 0, steps + 1)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def start(self, noise: Tensor) -> Tensor:
        return noise


@dataclass(frozen=True)
class Edm:
    """Variance exploding: a = 1, s = t, in the preconditioning of Karras et al. 2022. Times are the noise itself; low is clean.

        given = x_t / sqrt(t^2 + d^2);  clean = c_skip x_t + c_out F;  asked = scale ln t;  d: spread of the data
        c_skip = d^2 / ((t - e)^2 + d^2)        c_out = d (t - e) / sqrt(t^2 + d^2)

    boundary: a consistency function, e = low, so that at low it is what it is given (Song et al. 2023, as diffusers'
    CMStochasticIterativeScheduler has it; its cut of estimates to -1..1 is left out); else e = 0. Its grid takes every
    (count / steps)-th of `count` levels, as diffusers does."""

    low: float = 0.002
    high: float = 80.0
    data: float = 0.5
    boundary: bool = True
    scale: float = 250.0
    count: int = 40
    rho: float = 7.0

    @property
    def renoises(self) -> bool:
        return self.boundary

    @property
    def floor(self) -> float:
        return self.low if self.boundary else 0.0

    @property
    def sigmas(self) -> tuple[float, float]:
        return self.low, self.high

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(t)
        return torch.ones_like(t, dtype=torch.float32), t.float()

    def _skips(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(t).double()
        e = t - self.floor
        return (_wide(v, x) for v in (self.data**2 / (e * e + self.data**2), self.data * e / (t * t + self.data**2).sqrt()))

    def clean(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        skip, share = self._skips(x, t)
        return skip * x + share * out

    def target(self, x: Tensor, n: Tensor, t: Tensor) -> Tensor:
        noised = x + _wide(t, x) * n
        skip, share = self._skips(x, t)
        return (x - skip * noised) / share.clamp(min=1e-6)

    def given(self, x: Tensor, t: Tensor) -> Tensor:
        return x / (_wide(t, x).square() + self.data**2).sqrt()

    def asked(self, t: Tensor) -> Tensor:
        return self.scale * torch.log(t.float().clamp(min=1e-30))

    def times(self, u: Tensor) -> Tensor:
        """Log-normal (Karras et al. 2022)."""
        normal = torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6))
        return torch.exp(1.2 * normal - 1.2).clamp(self.low, self.high).float()

    def at(self, sigma: Tensor) -> Tensor:
        return sigma

    def grid(self, steps: int) -> Tensor:
        if not self.boundary:
            return torch.cat([karras(self.high, self.low, steps, self.rho), torch.zeros(1, dtype=torch.float64)])
        levels, apart = karras(self.high, self.low, self.count, self.rho), max(self.count // steps, 1)
        if steps > self.count:
            raise UserError("sampler.steps", steps, f"this consistency model has {self.count} levels; take no more steps")
        return torch.cat([levels[torch.arange(steps) * apart], levels.new_tensor([self.low])])

    def start(self, noise: Tensor) -> Tensor:
        return self.high * noise


def karras(begin: float, end: float, count: int, rho: float = 7.0) -> Tensor:
    """(count,) fp64 levels of noise from one to the other, even in their rho-th root; the ends to the bit."""
    share = torch.linspace(0, 1, count, dtype=torch.float64)
    levels = (begin ** (1 / rho) + share * (end ** (1 / rho) - begin ** (1 / rho))) ** rho
    levels[0], levels[-1] = begin, end if count > 1 else begin
    return levels


def process_of(scheduler: Any) -> Process:
    """The process of a base, from its scheduler's configuration (a dict, or a scheduler of diffusers)."""
    config = dict(getattr(scheduler, "config", scheduler))
    name = config.get("_class_name", type(scheduler).__name__)
    if "Flow" in name:
        for grid in ("use_dynamic_shifting", "shift_terminal"):
            if config.get(grid):
                mend = "sampling takes other steps with it, which are not known here; use a base without it, or leave it out"
                raise UserError(f"scheduler.{grid}", config[grid], mend)
        return Flow(config.get("shift", 1.0), float(config.get("num_train_timesteps", 1000)))
    predicts = config.get("prediction_type", "epsilon")
    if "CMStochastic" in name or ("EDM" in name and predicts == "epsilon"):
        boundary = "EDM" not in name
        known = {"low": "sigma_min", "high": "sigma_max", "data": "sigma_data", "rho": "rho", "count": "num_train_timesteps"}
        given = {field: config[theirs] for field, theirs in known.items() if theirs in config}
        return Edm(**given, boundary=boundary, scale=250.0 if boundary else 0.25)
    if predicts not in ("epsilon", "v_prediction", "sample") or "EDM" in name:
        raise UserError("scheduler", name, "this noise process is not known; use one of diffusion (betas), flow or consistency")
    if config.get("rescale_betas_zero_snr"):
        mend = "a chain that ends in pure noise is not known here; use a base without it"
        raise UserError("scheduler.rescale_betas_zero_snr", True, mend)
    return Diffusion(_betas(config), predicts, boundary="LCM" in name, clean_end=config.get("set_alpha_to_one", True))


def _betas(config: dict[str, Any]) -> tuple[float, ...]:
    T, low, high = config.get("num_train_timesteps", 1000), config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    kind, given = config.get("beta_schedule", "linear"), config.get("trained_betas")
    if given is not None:
        return tuple(given)
    if kind == "linear":
        return tuple(torch.linspace(low, high, T, dtype=torch.float64).tolist())
    if kind == "scaled_linear":
        return tuple(torch.linspace(low**0.5, high**0.5, T, dtype=torch.float64).square().tolist())
    if kind == "squaredcos_cap_v2":
        bar = lambda t: torch.cos((t + 0.008) / 1.008 * torch.pi / 2).square()
        t = torch.arange(T + 1, dtype=torch.float64) / T
        return tuple((1 - bar(t[1:]) / bar(t[:-1])).clamp(max=0.999).tolist())
    raise UserError("scheduler.beta_schedule", kind, "use linear, scaled_linear or squaredcos_cap_v2")
