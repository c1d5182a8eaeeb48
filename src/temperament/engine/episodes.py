"""Episodes: a policy acts in a world, many at once.

    played = play(model, world)                                  on the mean: how well it does
    played = play(model, world, explore="step", draw=(seed, step))    sampled, recorded: what reinforcement trains on

At every `execute`-th step the policy plans a chunk from what it sees; each step's planned action then goes by whatever
corrects it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from temperament.errors import UserError
from temperament.nn import draws
from temperament.nn.batch import Steps
from temperament.nn.forward import active, device_of, module_of


@dataclass
class Played:
    """success (episodes,) 0 or 1; length (episodes,): steps it took. steps, behaviour, rewards: of the decisions, where they
    were sampled."""

    success: Tensor
    length: Tensor
    steps: Steps | None = None
    behaviour: Tensor | None = None
    rewards: Tensor | None = None
    plans: int = 0  # times the policy was asked for a plan


@torch.no_grad()
def play(
    model: Any, world: Any, explore: Literal["", "step", "plan"] = "", draw: tuple[int, int] = (0, 0), who: Tensor | None = None
) -> Played:
    """explore: what is sampled (and recorded): the correction of each step, or each plan. draw: seed and step of the
    samples' address; who: the numbers of the episodes in it, by default those of the world (which episodes from one start
    share)."""
    config, device = module_of(model).config, device_of(model)
    n, held = len(world.examples), config.execute
    rows: dict[str, list[Tensor]] = {k: [] for k in ("observations", "planned", "decisions", "weights", "behaviour", "rewards")}
    keep = lambda **now: [rows[k].append(v) for k, v in now.items()]
    wide = {"step": config.actions, "plan": held * config.actions}.get(explore, 0)
    noise = (
        draws.normal(draw[0], f"explore/{explore}", draw[1], world.examples if who is None else who, (world.limit, wide)).to(
            device
        )
        if explore
        else None
    )
    with active(model):
        seen, _ = world.reset()
        length, success, plans = torch.zeros(n), torch.zeros(n), 0
        for t in range(world.limit):
            looks, alive = seen.to(device), (~world.done).float()
            if t % held == 0:
                says, plans = model(looks), plans + 1
                chunk = says.mean[..., : held * config.actions]
                if explore == "plan":
                    chunk = chunk + torch.exp(says.log_std[: chunk.shape[-1]]) * noise[:, t]
                    keep(observations=looks, decisions=chunk, behaviour=says.logp(chunk), weights=alive, rewards=torch.zeros(n))
                plan = chunk.view(n, held, config.actions)
            planned = plan[:, t % held]
            says, decision = model(looks, planned), None
            if explore == "step":
                if says.log_std is None:
                    raise UserError(
                        "explore",
                        "step",
                        "nothing corrects the plans of this policy: add a part that decides at every step, or explore: plan",
                    )
                decision = says.mean + torch.exp(says.log_std) * noise[:, t]
                keep(
                    observations=looks,
                    planned=planned,
                    decisions=decision,
                    behaviour=says.logp(decision),
                    weights=alive,
                    rewards=torch.zeros(n),
                )
            seen, reward, done, late, _ = world.step(says.action(decision))
            length, success = length + alive, success + reward
            if explore:
                rows["rewards"][-1] += reward
            if bool(done.all()) or bool(late.all()):
                break
    if not explore:
        return Played(success, length, plans=plans)
    along = {k: torch.stack(v, 1).cpu() for k, v in rows.items() if v}
    steps = Steps(along["observations"], along["decisions"], along["weights"], along.get("planned"))
    return Played(success, length, steps, along["behaviour"], along["rewards"], plans)
