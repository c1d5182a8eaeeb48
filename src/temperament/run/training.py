"""One train step of a recipe: build the players, take up the newest checkpoint, run the loop, leave a delta.

Nothing here knows a method. What must survive a kill is in the checkpoint: trained tensors and versions, optimizer state, the
stream's own state; everything random is addressed and needs none.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from temperament.delta import Delta
from temperament.errors import Interrupted, UserError
from temperament.nn.context import checkpointing
from temperament.run.artefacts import Folder
from temperament.run.recipe import Train
from temperament.train import checkpoint
from temperament.train.context import Context
from temperament.train.live import Live, twins
from temperament.train.loop import Player, Views, train


@dataclass
class Trained:
    delta: Delta
    steps: int
    tokens: int
    seconds: float
    stopped: str = ""  # why it ended before its last step


NOISE = ("attention_dropout", "activation_dropout", "dropout", "dropout_prob", "attn_dropout", "layerdrop", "hidden_dropout")


def quiet_training(component: nn.Module) -> None:
    """The mode a base is trained in: its own noise off. Its dropout draws by call order, which no split, resume or world size would
    repeat, and BatchNorm would couple the batch and move its statistics. Parts that want noise draw it by address. Only modules that
    recompute their activations are told that they train: most architectures ask for that."""
    component.eval()
    for module in component.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for name in NOISE:
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)


def build_players(spec: Train, ctx: Context, prepare: bool = True) -> list[Player]:
    """The main player `policy`, then the further ones, in the order of the recipe. prepare: let parts look at the data first."""
    company: list[Live] = []
    live = Live(ctx.base, [t.build(ctx.base, ctx) for t in spec.trainable], company)
    if not live.params:
        raise UserError("train.trainable", [type(t).part_name for t in spec.trainable], "nothing is trained; widen the selection or add an adapter")
    for part, trained in zip(spec.trainable, live.parts, strict=True):
        if prepare and hasattr(part, "prepare"):
            part.prepare(live, trained, ctx)
    others: dict[str, Live] = {"policy": live}
    views = Views(live, ctx.world, spec.micro, ctx.seed, others)
    ctx.live, ctx.views = live, views
    objectives = spec.objective if isinstance(spec.objective, dict) else dict.fromkeys(spec.objective.batch, spec.objective)
    players = [_player("policy", live, spec.optimizer, objectives, spec.regularizers, views, spec, ctx, spec.ema)]
    for name, more in spec.players.items():
        if name in others:
            raise UserError("train.players", name, "the main player is called so; give this one another name")
        if more.on not in (*others, "start"):
            raise UserError(f"train.players.{name}.on", more.on, f"give start, or a player before it: {', '.join(others)}")
        own = live
        if more.trainable:
            with twins(ctx.base):
                own = Live(ctx.base, [t.build(ctx.base, ctx) for t in more.trainable], company, others.get(more.on))
        others[name] = own
        its = _player(name, own, more.optimizer, more.objective, more.regularizers, Views(own, ctx.world, spec.micro, ctx.seed, others), spec, ctx)
        its.every, its.from_step = more.every, more.from_step
        players.append(its)
    return players


def _player(name: str, live: Live, optimizer: Any, objectives: dict, regularizers: list, views: Views, spec: Train, ctx: Context, ema: float | None = None) -> Player:
    needs = {n for p in [*objectives.values(), *regularizers, spec.source] for n in getattr(p, "needs", ())}
    stepper = optimizer.build(list(live.params.values()), ctx)
    player = Player(name, live, optimizer, stepper, objectives, list(regularizers), views, clip=spec.clip, ema=ema)
    if "start" in needs and any(part.pieces for part in live.parts) and any(not _zero(p) for part in live.parts for _, p in part.pieces.values()):
        live.mark("start")
    if "ema" in needs and spec.ema is None:
        raise UserError("train.ema", None, "a part reads the version `ema`; give its decay, e.g. ema: 0.99")
    return player


def _zero(piece: Any) -> bool:
    """Does this piece begin at no change? Then the step's start is simply the piece switched off."""
    return getattr(piece, "starts_at_zero", False)


def steps_of(spec: Train, stream: Any) -> int:
    if spec.steps is not None:
        return spec.steps
    per_epoch = getattr(stream, "steps_per_epoch", None)
    if not per_epoch:
        raise UserError("train.epochs", spec.epochs, "this source has no epochs; give steps")
    return math.ceil(spec.epochs * per_epoch)


def run_train(
    spec: Train,
    ctx: Context,
    folder: Folder,
    name: str,
    key: str,
    look: Callable[[Live, int], dict[str, float]],
    tell: Callable[..., None],
    every: int = 0,
) -> Trained:
    """Train, resumably. look(live, items) measures the skills watched while training; tell reports progress."""
    for component in ctx.base.components.values():
        if spec.checkpointing:
            checkpointing(component)
        quiet_training(component)
    players = build_players(spec, ctx)
    stream = spec.source.open(ctx)
    total = steps_of(spec, stream)
    kinds = {k for p in players for k in p.objectives}
    if not kinds & set(stream_kinds := getattr(stream, "yields", None) or spec.source.yields):
        raise UserError(f"{name}.train.objective", sorted(kinds), f"the source yields {', '.join(stream_kinds)}; choose an objective for that")
    place = folder.path / "checkpoints" / name.replace("/", ".")
    start, memory = _take_up(place, key, players, stream, tell)
    folder.log_cut(name, start)
    saved, tokens, seconds = time.monotonic(), memory.get("tokens", 0), memory.get("seconds", 0.0)
    stopped = memory.get("stopped", "")

    def save(done: int) -> None:
        nonlocal saved
        saved = time.monotonic()
        flush()
        if folder.write:
            _save(place, done, players, stream, {"key": key, "tokens": tokens, "seconds": seconds, "stopped": stopped}, spec.save.keep)
        ctx.world.wait()

    def record(row: dict[str, Any]) -> None:
        nonlocal tokens, seconds
        tokens, seconds = tokens + row.get("tokens", 0), seconds + row["seconds"]
        append(row)
        tell("step", name=name, total=total, **row)

    def after(done: int) -> bool:
        nonlocal stopped
        stop = spec.stop
        for period, items, watched in ((stop.every, stop.items, stop) if stop else (0, 0, None), (every, 0, None)):
            if period and done % period == 0 and not stopped:
                values = look(players[0].live, items)
                append({"step": done, "skills": values})
                tell("look", name=name, step=done, skills=values)
                if watched and values.get(watched.skill, 0.0) >= watched.reach:
                    stopped = f"{watched.skill} reached {values[watched.skill]:.3f} at step {done}"
        due = spec.save.steps and done % spec.save.steps == 0
        late = ctx.world.same(time.monotonic() - saved > spec.save.seconds)
        halt = ctx.world.same(asked.is_set())
        if (due or late or halt) and done < total:
            save(done)
        if halt and done < total and not stopped:
            raise Interrupted(f"Interrupted after step {done} of {total} of {name!r}; everything is saved. Go on with --resume.")
        return bool(stopped)

    done = start
    with folder.logging(name) as (append, flush), listening() as asked:
        if start < total and not stopped:
            try:
                done = train(players, stream, total, micro=spec.micro, start=start, record=record, after=after, round=ctx.round)
            except BaseException:
                with contextlib.suppress(Exception):
                    flush()
                for player in players:  # whoever goes on with this base in this process finds nothing left on it
                    player.live.close()
                raise
    live = players[0].live
    for component in ctx.base.components.values():
        component.eval()
        if spec.checkpointing:
            checkpointing(component, enabled=False)
    if spec.keep != "live" and spec.keep in live.versions:
        live.load_state_dict(live.state_dict() | {f"param/{n}": t for n, t in live.versions[spec.keep].items()})
    delta = live.delta()
    for player in players:
        player.live.close()
    return Trained(delta, done, tokens, seconds, stopped)


@contextlib.contextmanager
def listening():
    """An event set by Ctrl-C (and SIGTERM): the loop ends its step, saves, and says how to go on. A second Ctrl-C ends at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def _save(place: Path, done: int, players: list[Player], stream: Any, memory: dict, keep: int) -> None:
    tensors, rest = {}, {}
    for p in players:
        if p.name in owners(players):
            tensors[f"{p.name}.live"] = p.live.state_dict()
        tensors[f"{p.name}.optimizer"], rest[p.name] = checkpoint.flatten_optimizer(p.stepper)
    source = stream.state_dict() if hasattr(stream, "state_dict") else {}
    if source.get("tensors"):
        tensors["source"] = source["tensors"]
    checkpoint.save(place, done, tensors, {**memory, "optimizers": rest, "source": source.get("json")}, keep)


def owners(players: list[Player]) -> list[str]:
    """The players that have a trainable of their own; the others share one of these."""
    return [p.name for i, p in enumerate(players) if all(p.live is not q.live for q in players[:i])]


def _take_up(place: Path, key: str, players: list[Player], stream: Any, tell: Callable) -> tuple[int, dict[str, Any]]:
    found = checkpoint.load_newest(place)
    if found is None or found[0].get("key") != key:
        return 0, {}
    state, tensors = found
    for why in state["damaged"]:
        tell("note", text=f"checkpoint passed over: {why}")
    for p in players:
        if p.name in owners(players):
            p.live.load_state_dict(tensors[f"{p.name}.live"])
        checkpoint.unflatten_optimizer(p.stepper, tensors[f"{p.name}.optimizer"], state["optimizers"][p.name])
    if state.get("source") is not None or "source" in tensors:
        stream.load_state_dict({"tensors": tensors.get("source", {}), "json": state.get("source")})
    tell("note", text=f"resumed at step {state['step']}")
    return state["step"], state
