"""A policy: a network that plans actions in chunks, and what it says of one moment.

    says = policy(observations)                  the plan made here: `says.mean` (..., horizon * actions), a chunk, time by time
    says = policy(observations, planned)         what it adds, at this very step, to the action that was planned for it
    says.action(decision)                        what is then done, in the world's normalised actions (-1 to 1)

A bare policy adds nothing to its plans. What is put around it may: it decides at every step,
while the plan is made anew only when the last one is used up. Decisions are Gaussian; log-probs are of the decision, never
of the action it leads to."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MODEL_TYPE = "temperament_policy"  # in config.json: how such a folder is told from one of transformers


@dataclass(frozen=True)
class PolicyConfig:
    world: str  # the world it acts in (bases/worlds/control.py)
    observations: int  # numbers seen at each step
    actions: int  # numbers an action has
    horizon: int = 8  # actions of a plan
    execute: int = 8  # of which so many are carried out before the next plan
    width: int = 128  # hidden units
    layers: int = 2  # hidden layers
    log_std: float = -1.5  # of the spread of decisions, where a run begins to explore with plans

    @property
    def features(self) -> int:
        """How wide what critics read is: what is seen, and what is planned."""
        return self.observations + self.actions


@dataclass(frozen=True)
class Says:
    """A Gaussian decision: mean (..., k), log_std (k,); None: there is nothing to decide. action = about + scale * decision;
    without `about` the decision itself."""

    mean: Tensor
    log_std: Tensor | None
    about: Tensor | None = None
    scale: float = 1.0

    def logp(self, decision: Tensor) -> Tensor:
        """(...,): log-prob of the part of a decision that was carried out, its first entries."""
        k = decision.shape[-1]
        assert self.log_std is not None and k <= self.mean.shape[-1], "nothing was decided here"
        log_std = self.log_std[:k]
        z = (decision - self.mean[..., :k]) * torch.exp(-log_std)
        return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def action(self, decision: Tensor | None = None) -> Tensor:
        """What is done; by default on the mean."""
        if self.about is None:
            return self.mean if decision is None else decision
        if self.log_std is None:
            return self.about
        return self.about + self.scale * (self.mean if decision is None else decision)


class Policy(nn.Module):
    """mean = W_out silu(... W_1 o + b_1 ...) + b_out;   o (..., observations)."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.config = config
        widths = [config.observations, *[config.width] * config.layers]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(config.width, config.horizon * config.actions)
        self.log_std = nn.Parameter(torch.full((config.actions,), config.log_std))

    def forward(self, observations: Tensor, planned: Tensor | None = None) -> Says:
        if planned is not None:
            return Says(planned, None, about=planned)
        x = observations
        for layer in self.layers:
            x = nn.functional.silu(layer(x))
        return Says(self.head(x), self.log_std.repeat(self.config.horizon))

    def save_pretrained(self, folder: Path | str, **_: Any) -> None:
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.detach().cpu().contiguous() for n, t in self.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": MODEL_TYPE, **asdict(self.config)}, indent=1) + "\n")

    @classmethod
    def shell(cls, config: dict[str, Any]) -> Policy:
        """Of this config.json, with weights of no meaning."""
        known = PolicyConfig.__dataclass_fields__
        return cls(PolicyConfig(**{k: v for k, v in config.items() if k in known}))

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Policy:
        from safetensors.torch import load_file

        folder = Path(folder)
        made = cls.shell(json.loads((folder / "config.json").read_text()))
        made.load_state_dict(load_file(folder / "model.safetensors"))
        return made
