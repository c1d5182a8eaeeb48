"""The loop: every method in this library trains here, and nothing here knows a method.

    for each step:
        batches  = stream.batch(step)                        the whole effective batch, the same on every process
        for each player whose kind of batch came:
            whole  = objective.prepare(batch)                once: references, advantages, matching; later players see it
            for each of objective.updates(whole):            one, unless it takes several steps on what was sampled once
                counts = objective.counts(whole) + ...       known before the first backward
                for each micro-batch of my rows:
                    backward( sum_t  weight_t * sum_t / count_t )
                add up over processes, check that it is finite, clip, step

A term is a sum and its count belongs to the whole batch, so the gradient does not depend on how the rows were split over
micro-batches, padding, packing or processes: that is the exactness law, and it holds by construction.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from temperament.errors import UserError, WorkFailed, nearest
from temperament.nn.batch import Batch
from temperament.nn.context import context
from temperament.nn.draws import Address
from temperament.parts import at
from temperament.protocols import Progress, Term, Terms
from temperament.train.live import Live, View
from temperament.train.world import World


class Views:
    """What an objective may see: the live model, any version of it, and a way to precompute once for a whole batch."""

    def __init__(self, live: Live, world: World, micro: int, seed: int, others: dict[str, Live] | None = None):
        self.live, self.world, self.micro, self.seed = live, world, micro, seed
        self.others = others or {}
        self.progress = Progress(0, 1)

    @property
    def model(self) -> torch.nn.Module:
        return self.live.model

    def at(self, version: str):
        """Context: the model as `version` ("base", "start", ...); "player:version" reaches another player."""
        player, _, version = version.rpartition(":")
        return (self.others[player] if player else self.live).at(version)

    def view(self, version: str) -> View:
        """The same as something to call: what `score(..., kl(view))` takes."""
        player, _, version = version.rpartition(":")
        return (self.others[player] if player else self.live).view(version)

    def head(self, name: str) -> torch.nn.Module:
        """A head of this player ("value") or of another ("critic:value"); it reads nn/heads.py's `states`."""
        player, _, name = name.rpartition(":")
        if player and player not in self.others:
            raise UserError("players", player, f"no player is called so; {nearest(player, self.others)}")
        heads = (self.others[player] if player else self.live).heads
        if name not in heads:
            mend = "add a part that brings one to its trainable; temper parts --room adapters lists them"
            raise UserError(
                "head", name, f"{player or 'the player'} has no such head; {nearest(name, heads) if heads else mend}"
            )
        return heads[name]

    @torch.no_grad()
    def precompute(self, version: str, whole: Batch, fn: Callable[[torch.nn.Module, Batch], Tensor]) -> Tensor:
        """fn(model as `version`, micro) for every row of the whole batch, without gradient; rows in order, on every process."""
        mine = whole.shard(self.world.rank, self.world.size)
        rows: list[Tensor] = []
        with self.at(version) as model, self.world.autocast():
            for micro in mine.split(self.micro):
                rows.extend(fn(model, micro.to(self.world.device)).float().cpu().unbind(0))
        rows = self.world.gather_rows(rows, len(whole))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows[0].dim() else torch.stack(rows)


@dataclass
class Player:
    """A trainable with its optimizer and what it optimises, by kind of batch."""

    name: str
    live: Live
    optimizer: Any  # the part (its lr may be a schedule)
    stepper: torch.optim.Optimizer
    objectives: dict[str, Any]
    regularizers: list[Any]
    views: Views
    clip: float | None = 1.0
    ema: float | None = None
    every: int = 1
    from_step: int = 0


@dataclass
class Accumulated:
    terms: dict[str, float] = field(default_factory=dict)  # means: sum / count
    loss: float = 0.0
    counts: dict[str, float] = field(default_factory=dict)
    tokens: int = 0


def run_batch(player: Player, objective: Any, whole: Batch, progress: Progress, micro: int) -> Accumulated:
    """Forward and backward of one whole batch: leaves d(loss)/d(parameters) in .grad, summed over processes."""
    with player.live.at("live"):
        out = accumulate(player, objective, prepared(player, objective, whole, progress), progress, micro)
    _reduce(player)
    return out


def prepared(player: Player, objective: Any, whole: Batch, progress: Progress) -> Batch:
    """The whole batch as the objective wants it."""
    player.views.progress = progress
    objective = at(objective, progress)
    return objective.prepare(whole, player.views) if hasattr(objective, "prepare") else whole


def updates(player: Player, objective: Any, whole: Batch, progress: Progress) -> list[Batch]:
    """The batches of the optimizer steps that a prepared one is taken in."""
    objective = at(objective, progress)
    return objective.updates(whole, player.views) if hasattr(objective, "updates") else [whole]


def accumulate(player: Player, objective: Any, whole: Batch, progress: Progress, micro: int) -> Accumulated:
    """Forward and backward of a prepared batch: adds this process's share of d(loss)/d(parameters) to .grad."""
    views, world = player.views, player.views.world
    objective = at(objective, progress)
    regularizers = [at(r, progress) for r in player.regularizers]
    regularizers = [*(t for part in player.live.parts for t in part.terms), *regularizers]
    each = [objective, *(r for r in regularizers if r.per == "batch")]
    for r in regularizers:
        if hasattr(r, "prepare"):
            r.prepare(whole, views)
    whole_counts: dict[str, float] = {}
    names = [_named(p.counts(whole), whole_counts) for p in each]
    out = Accumulated(counts=whole_counts, tokens=_tokens(whole))
    sums: dict[str, float] = dict.fromkeys(whole_counts, 0.0)
    weights: dict[str, float] = dict.fromkeys(whole_counts, 0.0)
    mine = whole.shard(world.rank, world.size)
    # Every module that draws (dropout) finds its address here; the token's example and position are added where tokens are
    # scored.
    address = Address(views.seed, "forward", progress.step, torch.empty(0, dtype=torch.long))
    for terms in _forward(each, names, objective, mine, views, micro, address):
        total = None
        for name, term in terms.items():
            weights[name] = term.weight
            if term.count == 0:
                continue
            sums[name] += float(term.value.detach())
            if term.weight != 0 and whole_counts[name]:
                part = term.value * (term.weight / whole_counts[name])
                total = part if total is None else total + part
        if total is not None and total.requires_grad:
            world.backward(total)
    sums, weights = world.total(sums), _agreed(weights, len(mine), world)
    for r in (r for r in regularizers if r.per == "step"):
        terms = r.loss(None, views)
        for name, term in zip(
            _named({n: t.count for n, t in terms.items()}, whole_counts).values(), terms.values(), strict=True
        ):
            world.backward(term.value * (term.weight / max(term.count, 1) / world.size))
            sums[name], weights[name], whole_counts[name] = float(term.value.detach()), term.weight, max(term.count, 1)
    out.terms = {n: sums[n] / whole_counts[n] for n in sums if whole_counts[n]}
    out.loss = sum(weights[n] * v for n, v in out.terms.items() if weights[n])
    return out


def _named(counts: dict[str, float], taken: dict[str, float]) -> dict[str, str]:
    """A part's own term names -> names in the loss, its counts noted in `taken`: of two called "kl" the second is "kl-2"."""
    names = {}
    for name, count in counts.items():
        names[name] = next(n for n in (name, *(f"{name}-{k}" for k in range(2, len(taken) + 3))) if n not in taken)
        taken[names[name]] = count
    return names


def _forward(
    each: list, names: list[dict[str, str]], objective: Any, mine: Batch, views: Views, micro: int, address: Address
) -> Iterator[Terms]:
    """The terms of every micro-batch. A coupled objective runs twice: statistics without gradient, then the same statistics
    again with the gradient the couple asks for - the exact gradient of a loss that is not a sum over examples, under any
    split."""
    device = views.world.device
    coupling = _couple(objective, mine, views, micro, address) if hasattr(objective, "statistics") else None
    for k, part in enumerate(mine.split(micro)):
        part = part.to(device)
        with views.world.autocast(), context(draws=address):
            terms: Terms = {}
            for p, called in zip(each, names, strict=True):
                if p is objective and coupling is not None:
                    again, here = p.statistics(part, views), slice(k * micro, k * micro + len(part))
                    first = k == 0 and views.world.rank == 0
                    own = {n: _share(t, again, wanted, here, first=first) for n, (t, wanted) in coupling.items()}
                else:
                    own = p.loss(part, views)
                terms |= {called[n]: t for n, t in own.items()}
        yield terms


def _couple(objective: Any, mine: Batch, views: Views, micro: int, address: Address) -> dict[str, tuple[Term, Tensor | None]]:
    """The terms of a coupled loss over all rows of all processes, each with d(term)/d(statistics) of my rows (None: no
    gradient)."""
    world = views.world
    with torch.no_grad(), world.autocast(), context(draws=address):
        rows = [
            r for part in mine.split(micro) for r in objective.statistics(part.to(world.device), views).float().cpu().unbind(0)
        ]
    count = int(world.total({"rows": float(len(rows))})["rows"])
    everything = torch.stack(world.gather_rows(rows, count)).requires_grad_(True)
    found: dict[str, tuple[Term, Tensor | None]] = {}
    for name, term in objective.couple(everything).items():
        moves = term.value.requires_grad
        wanted = torch.autograd.grad(term.value, everything, retain_graph=True)[0][world.rank :: world.size] if moves else None
        found[name] = (Term(term.value.detach(), term.count, term.weight), wanted)
    return found


def _share(term: Term, again: Tensor, wanted: Tensor | None, here: slice, first: bool) -> Term:
    """What one micro-batch gives to a coupled term: its gradient through the statistics; the value counts once."""
    value = term.value.to(again) * first
    if wanted is not None:
        moved = (again * wanted[here].to(again)).sum()
        value = value + moved - moved.detach()
    return Term(value, term.count, term.weight)


def _agreed(weights: dict[str, float], rows: int, world: World) -> dict[str, float]:
    """The weight of each term: a process without rows has seen none."""
    if world.size == 1:
        return weights
    total = world.total({"": float(rows > 0), **{n: w if rows else 0.0 for n, w in weights.items()}})
    return {n: total[n] / max(total[""], 1.0) for n in weights}


def _reduce(player: Player) -> None:
    """Add up the gradients of all processes: once for each optimizer step, whatever was accumulated in it. A tensor that no
    process used keeps no gradient, as with one process."""
    params, world = player.live.params, player.views.world
    if world.scale != 1:
        for p in params.values():
            if p.tensor.grad is not None:
                p.tensor.grad.div_(world.scale)
    if world.size == 1:
        return
    used = world.total({n: float(p.tensor.grad is not None) for n, p in params.items()})
    tensors = [p.tensor for n, p in params.items() if used[n]]
    for tensor in tensors:
        if tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor)
    world.reduce([t.grad for t in tensors])


def _tokens(batch: Batch) -> int:
    from temperament.nn.batch import Tokens

    if isinstance(batch, Tokens):
        return int(batch.mask.sum())
    return sum(_tokens(v) for v in vars(batch).values() if isinstance(v, Batch))


def grad_norm(player: Player) -> float:
    grads = [p.tensor.grad for p in player.live.params.values() if p.tensor.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0


def update(player: Player, progress: Progress, norm: float) -> float:
    """Clip, set the rate of the moment, step. Returns the rate."""
    if player.clip is not None and norm > player.clip:
        for p in player.live.params.values():
            if p.tensor.grad is not None:
                p.tensor.grad.mul_(player.clip / norm)
    rate = at(player.optimizer, progress).lr
    for group in player.stepper.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)
    player.live.before_step(progress)
    player.stepper.step()
    player.live.after_step(progress)
    for r in player.regularizers:
        if hasattr(r, "after_step"):
            r.after_step(progress)
    player.live.reselect(progress, player.stepper.state)
    player.stepper.zero_grad(set_to_none=True)
    if player.ema is not None:
        _average(player.live, player.ema)
    return rate


@torch.no_grad()
def _average(live: Live, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * live;   from the step's start."""
    if "ema" not in live.versions:
        live.mark("ema")
        return
    for name, p in live.params.items():
        live.versions["ema"][name].lerp_(p.held.detach(), 1 - decay)


def train(
    players: list[Player],
    stream: Any,
    total: int,
    *,
    micro: int,
    start: int = 0,
    record: Callable[[dict], None] = lambda row: None,
    after: Callable[[int], bool] = lambda done: False,
    round: int = 0,
) -> int:
    """Steps `start`..`total`-1. `record(row)` gets one dict a step; `after(steps done)` may checkpoint and evaluate, and
    ends the training by returning True. Returns the number of steps done. A loss that is not finite raises WorkFailed
    *before* the parameters are touched, naming the rows."""
    per_epoch = getattr(stream, "steps_per_epoch", None)
    for step in range(start, total):
        progress = Progress(step, total, epoch=step / per_epoch if per_epoch else 0.0, round=round)
        began = time.perf_counter()
        batches = stream.batch(step, progress)
        batches = batches if isinstance(batches, list) else [batches]
        kinds = {type(b).__name__ for b in batches}
        if not any(kinds & set(p.objectives) for p in players):  # it would go through the data and learn nothing
            wanted = ", ".join(k for p in players for k in p.objectives)
            raise UserError(
                "train.objective", wanted, f"the source gave {', '.join(sorted(kinds))}; choose an objective for that"
            )
        row: dict[str, Any] = {"step": step + 1, "loss": 0.0}
        for player in players:
            if step < player.from_step or step % player.every:
                continue
            prefix = "" if len(players) == 1 else f"{player.name}/"
            work: list[tuple[Any, list[Batch]]] = []
            with player.live.at("live"):
                for batch in batches:
                    objective = player.objectives.get(type(batch).__name__)
                    if objective is not None:
                        work.append(
                            (objective, updates(player, objective, prepared(player, objective, batch, progress), progress))
                        )
                times = max((len(wholes) for _, wholes in work), default=0)
                for k in range(times):
                    for objective, whole in [(o, wholes[k]) for o, wholes in work if k < len(wholes)]:
                        got = accumulate(player, objective, whole, progress, micro)
                        if not math.isfinite(got.loss):
                            raise WorkFailed(_explain(player, objective, whole, progress, step, got.loss))
                        row["loss"] += got.loss / times
                        terms = row.setdefault("terms", {})
                        for n, v in got.terms.items():
                            terms[f"{prefix}{n}"] = terms.get(f"{prefix}{n}", 0.0) + v / times
                        row["tokens"] = row.get("tokens", 0) + got.tokens
                    _reduce(player)
                    norm = grad_norm(player)
                    if not math.isfinite(norm):
                        raise WorkFailed(_explain(player, objective, whole, progress, step, norm, what="gradient norm"))
                    row[f"{prefix}grad_norm"] = norm
                    row[f"{prefix}lr"] = update(player, progress, norm)
        if hasattr(stream, "feedback"):
            row |= stream.feedback(batches, row) or {}
        row["seconds"] = time.perf_counter() - began
        record(row)
        if after(step + 1):
            return step + 1
    return total


@torch.no_grad()
def _explain(
    player: Player, objective: Any, whole: Batch, progress: Progress, step: int, value: float, what: str = "loss"
) -> str:
    """Which rows of the batch are not finite on their own, and the likely cause, in a sentence."""
    objective = at(objective, progress)
    bad, culprit = [], ""
    try:
        for i, one in enumerate(whole.split(1)):
            terms = objective.loss(one.to(player.views.world.device), player.views) if hasattr(objective, "loss") else {}
            if any(not torch.isfinite(t.value).all() for t in terms.values()):
                bad.append(i)
    except Exception as problem:  # explaining must never hide the failure it explains
        culprit = f" (a row could not be re-run: {problem})"
    dead = [n for n, p in player.live.params.items() if not torch.isfinite(p.tensor).all()]
    if dead:
        likely = (
            f"{len(dead)} trained tensors are already not finite (first: {dead[0]}): the base or an earlier step is damaged"
        )
    elif bad and len(bad) < len(whole):
        likely = "these rows hold values the model cannot score: look at them with `temper data`"
    else:
        likely = "the learning rate is too high for this objective: lower optimizer.lr, or add warm-up or clipping"
    rows = ", ".join(_row_name(whole, i) for i in bad[:8]) or "none alone"
    where = f"{what} became {value} at step {step + 1}; rows that are not finite alone: {rows}{culprit}"
    return f"{where}; likely cause: {likely}. The last good state is kept: resume with --resume."


def _row_name(whole: Batch, i: int) -> str:
    from temperament.nn.batch import Tokens

    tokens = whole if isinstance(whole, Tokens) else next((v for v in vars(whole).values() if isinstance(v, Tokens)), None)
    if tokens is None:
        return f"row {i}"
    return f"row {i} (example {int(tokens.examples[i].max())})"
