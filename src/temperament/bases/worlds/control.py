"""Worlds to act in, many episodes at once, with the interface of gymnasium's vector environments on tensors.

    world = make("peg", "insert", examples=torch.arange(256), seed=0)
    seen, _ = world.reset()                                     (episodes, observations)
    seen, reward, done, late, _ = world.step(actions)           actions (episodes, 2) in -1..1

Starts and disturbances are addressed by (seed, purpose, step, episode): an episode is the same whatever else runs beside it,
before and after a change of the policy, killed and resumed. `purpose` "test" gives starts no training sees. Once an episode
is done its rewards are 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from temperament.errors import UserError, nearest
from temperament.nn import draws

TASKS = ("insert", "wide", "reach", "lift", "rest")


@dataclass
class Peg:
    """A peg held from above, over a table with a slot. Lengths are shares of the half width of the room, x in -1..1, y in 0..1,
    the table at 0.

        position <- position + 0.08 * clip(action) + slip,      slip ~ N(0, 0.02^2) in x and y

    The table stops the peg, on which it then hardly slides (a tenth of what is asked); the slot, 0.15 deep, lets in what comes
    within half its width of its middle, and its walls hold it, at half speed while it rubs. Reward 1, once, when the task is
    done; 40 steps.

        insert   down a slot of half width 0.03        reach    to within 0.1 of a point in the air
        wide     down a slot of half width 0.12        lift     out of the slot of insert, above 0.3
                                                       rest     on the table within 0.1 of a mark

    Seen: x, y, x and y of the goal, ten times the slot's half width, and which task (one of five).
    """

    task: str
    examples: Tensor
    seed: int = 0
    purpose: str = "train"
    at: int = 0
    limit: int = 40

    name = "peg"
    tasks = TASKS
    distance = {"wide": "near", "reach": "middle", "rest": "middle", "lift": "far"}  # of what is retained, from insert
    observations, actions = 4 + 1 + len(TASKS), 2
    stride, slip, slide, depth = 0.08, 0.02, 0.1, 0.15

    def __post_init__(self):
        if self.task not in TASKS:
            raise UserError("task", self.task, nearest(self.task, TASKS))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Tensor, dict]:
        """The start of every episode."""
        self.seed = self.seed if seed is None else seed
        n, self.time = len(self.examples), 0
        u = draws.uniform(self.seed, f"peg/{self.purpose}/{self.task}", self.at, self.examples, (4,))
        self.noise = draws.normal(self.seed, f"peg/{self.purpose}/{self.task}/slip", self.at, self.examples, (self.limit, 2))
        self.x, self.y = 1.6 * u[:, 0] - 0.8, 0.5 + 0.4 * u[:, 1]
        self.goal = torch.stack([u[:, 2] - 0.5, torch.zeros(n)], 1)
        self.half = 0.12 if self.task == "wide" else 0.03
        if self.task == "reach":
            self.goal[:, 1] = 0.2 + 0.6 * u[:, 3]
        elif self.task == "lift":
            self.x, self.y = self.goal[:, 0].clone(), -0.8 * self.depth + 0 * self.y
        self.done = torch.zeros(n, dtype=torch.bool)
        return self.seen(), {}

    def seen(self) -> Tensor:
        one = torch.zeros(len(self.x), len(TASKS))
        one[:, TASKS.index(self.task)] = 1
        return torch.cat([self.x[:, None], self.y[:, None], self.goal, torch.full((len(self.x), 1), 10 * self.half), one], 1)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        """(seen, reward, done, out of time, {}) after one action of every episode; those that are done stand still."""
        move = self.stride * actions.detach().float().cpu().clamp(-1, 1) + self.slip * self.noise[:, self.time]
        x, y, middle = self.x + move[:, 0], self.y + move[:, 1], self.goal[:, 0]
        slot = self.task in ("insert", "wide", "lift")
        inside = self.y < 0
        held = x.clamp(middle - self.half, middle + self.half)
        rubs = inside & (held != x)
        y = torch.where(rubs, self.y + 0.5 * (y - self.y), y)
        x = torch.where(inside, held, x)
        lands = ~inside & (y < 0)
        slid = self.x + torch.where(self.y == 0, self.slide, 1.0) * (x - self.x)
        x = torch.where(lands, slid, x)
        enters = lands & ((x - middle).abs() <= self.half) if slot else torch.zeros_like(lands)
        y = torch.where(lands & ~enters, 0.0, y)
        x, y = x.clamp(-1, 1), y.clamp(-self.depth, 1)
        self.x, self.y = torch.where(self.done, self.x, x), torch.where(self.done, self.y, y)
        self.time += 1
        now = self.solved() & ~self.done
        self.done = self.done | now
        return self.seen(), now.float(), self.done, torch.full_like(self.done, self.time >= self.limit), {}

    def solved(self) -> Tensor:
        if self.task in ("insert", "wide"):
            return self.y <= -0.8 * self.depth
        if self.task == "reach":
            return torch.hypot(self.x - self.goal[:, 0], self.y - self.goal[:, 1]) < 0.1
        if self.task == "lift":
            return self.y >= 0.3
        return (self.y == 0) & ((self.x - self.goal[:, 0]).abs() < 0.1)

    def expert(self, at: int = 0, aim: float = 0.0, shake: float = 0.0) -> Tensor:
        """(episodes, 2): a demonstrator's action. aim: spread of the error with which it sees the goal, one an episode; shake:
        of its hand."""
        who = (self.seed, f"peg/{self.purpose}/{self.task}/hand")
        off = aim * draws.normal(*who, at, self.examples, 0)
        tremble = shake * draws.normal(*who, at, self.examples, (self.limit, 2))[:, self.time]
        goal_x, goal_y = self.goal[:, 0] + off, self.goal[:, 1]
        if self.task == "lift":
            goal_x, goal_y = self.goal[:, 0], torch.full_like(goal_y, 0.5)
        elif self.task in ("insert", "wide"):
            above = (self.x - goal_x).abs() > 0.05
            goal_y = torch.where(above & (self.y > 0), torch.clamp(self.y, max=0.25), -1.0)
            goal_y = torch.where(above & (self.y > 0.25), 0.25, goal_y)
        elif self.task == "rest":
            goal_y = torch.full_like(goal_y, -0.2)
        reach = torch.stack([goal_x - self.x, goal_y - self.y], 1) / self.stride
        return (reach / reach.abs().amax(1, keepdim=True).clamp(min=1) + tremble).clamp(-1, 1)

    def words(self) -> list[tuple[str, str]]:
        """(the start, how it stands now) of every episode, for people to read."""
        start = [f"{self.task}: from ({x:+.2f}, {y:.2f}), goal at ({a:+.2f}, {b:.2f})" for x, y, a, b in
                 zip(self.x.tolist(), self.y.tolist(), *self.goal.T.tolist(), strict=True)]  # fmt: skip
        end = [
            f"{'done' if d else 'not done'} at ({x:+.2f}, {y:.2f})"
            for x, y, d in zip(self.x.tolist(), self.y.tolist(), self.done.tolist(), strict=True)
        ]
        return list(zip(start, end, strict=True))


WORLDS: dict[str, type] = {"peg": Peg}


def make(world: str, task: str, examples: Tensor, seed: int = 0, purpose: str = "train", at: int = 0) -> Any:
    """These episodes of a task. at: which batch of training they belong to."""
    if world not in WORLDS:
        raise UserError("world", world, nearest(world, WORLDS))
    return WORLDS[world](task, examples, seed, purpose, at)


def tasks(world: str) -> tuple[str, ...]:
    if world not in WORLDS:
        raise UserError("world", world, nearest(world, WORLDS))
    return WORLDS[world].tasks


def demonstrated(
    world: str, task: str, examples: Tensor, seed: int, horizon: int, aim: float = 0.0, shake: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Demonstrations of a task, as (seen (episodes, T, observations), plans (episodes, T, horizon * actions), weight
    (episodes, T)): at each step what is seen and the demonstrator's next `horizon` actions (at the end its last one stays).
    weight 1 until it is done."""
    it = make(world, task, examples, seed, "train")
    seen, looks, acts, alive = it.reset()[0], [], [], []
    for _ in range(it.limit):
        action = it.expert(0, aim, shake)
        looks, acts, alive = [*looks, seen], [*acts, action], [*alive, (~it.done).float()]
        seen, *_ = it.step(action)
    weight, steps = torch.stack(alive, 1), torch.stack(acts, 1)
    last = weight.sum(1).long() - 1
    ahead = torch.arange(it.limit)[:, None] + torch.arange(horizon)  # (T, horizon)
    index = torch.minimum(ahead[None], last[:, None, None])
    plans = steps[torch.arange(len(examples))[:, None, None], index]
    return torch.stack(looks, 1), plans.flatten(2), weight
