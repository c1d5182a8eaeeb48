"""One train step of a recipe: build the players, take up the newest checkpoint, run the loop, leave a delta.

Nothing here knows a method. What must survive a kill is in the checkpoint: trained tensors and versions, optimizer state, the
stream's own state; everything random is addressed and needs none.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from temperament.delta import Delta
from temperament.errors import Interrupted, UserError
from temperament.nn.batch import Batch
from temperament.nn.context import checkpointing
from temperament.protocols import Progress
from temperament.run.artefacts import Folder, walk_all
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
    """The mode a base is trained in: its own noise off. Its dropout draws by call order, which no split, resume or world
    size would repeat, and BatchNorm would couple the batch and move its statistics. Parts that want noise draw it by
    address. Only modules that recompute their activations are told that they train: most architectures ask for that."""
    component.eval()
    for module in component.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for name in NOISE:
                if isinstance(vars(module).get(name), float):
                    setattr(module, name, 0.0)


def build_players(spec: Train, ctx: Context, prepare: bool = True) -> list[Player]:
    """The main player `policy`, then the further ones in their order. prepare: let parts look at the data first."""
    must_be_whole(spec, ctx.world.size)
    company: list[Live] = []
    try:
        return _players(spec, ctx, prepare, company)
    except BaseException:
        for live in company:  # a later one was refused: nothing stays on the modules
            live.close()
        raise


def _players(spec: Train, ctx: Context, prepare: bool, company: list[Live]) -> list[Player]:
    seen = _seen(spec, ctx) if prepare else {}  # while nothing is attached yet
    live = Live(ctx.base, _built(spec.trainable, "trainable", spec, ctx, prepare), company)
    if not live.params:
        raise UserError(
            "train.trainable",
            [type(t).part_name for t in spec.trainable],
            "nothing is trained; widen the selection or add an adapter",
        )
    others: dict[str, Live] = {"policy": live}
    views = Views(live, ctx.world, spec.micro, ctx.seed, others)
    ctx.live, ctx.views = live, views
    objectives = spec.objective if isinstance(spec.objective, dict) else dict.fromkeys(spec.objective.batch, spec.objective)
    players = [_player("policy", live, spec.optimizer, objectives, spec.regularizers, views, spec, ctx, seen)]
    for name, more in spec.players.items():
        if name in others:
            raise UserError("train.players", name, "the main player is called so; give this one another name")
        if more.on not in (*others, "start"):
            raise UserError(f"train.players.{name}.on", more.on, f"give start, or a player before it: {', '.join(others)}")
        own = live
        if more.trainable:
            with twins(ctx.base):
                own = Live(ctx.base, _built(more.trainable, name, spec, ctx, prepare), company, others.get(more.on))
        others[name] = own
        views = Views(own, ctx.world, spec.micro, ctx.seed, others)
        its = _player(name, own, more.optimizer, more.objective, more.regularizers, views, spec, ctx, seen)
        its.every, its.from_step = more.every, more.from_step
        its.ema = its.ema if own is not live else None  # one mean of one trainable
        players.append(its)
    _hold([*objectives.values(), *spec.regularizers, spec.source], players[0].views)
    for player, more in zip(players[1:], spec.players.values(), strict=True):
        _hold([*more.objective.values(), *more.regularizers], player.views)
    return players


def must_be_whole(spec: Train, processes: int) -> None:
    """Refuse to split a batch whose rows a part makes depend on each other: what it then learns would hang on the split."""
    coupling = [type(p).part_name for p in walk_all(spec) if "couples the batch" in p.part_declares]
    if coupling and (spec.micro < spec.batch or processes > 1):
        mend = f"{coupling[0]} couples the rows of a batch, which must be one forward: set micro to {spec.batch}"
        raise UserError("train.micro", spec.micro, mend + (", and use one process" if processes > 1 else ""))


def _built(trainables: list[Any], whose: str, spec: Train, ctx: Context, prepare: bool) -> list[Any]:
    """Each trainable on the base, after its look at the data."""
    made = []
    for i, part in enumerate(trainables):
        ctx.prepared = prepared(part, f"{whose}-{i}", spec, ctx) if prepare and hasattr(part, "prepare") else {}
        made.append(part.build(ctx.base, ctx))
    ctx.prepared = {}
    return made


def _seen(spec: Train, ctx: Context) -> dict[str, dict[str, Tensor]]:
    """What regularizers that remember learn from the data, by their place."""
    every = [("policy", spec.regularizers), *((n, more.regularizers) for n, more in spec.players.items())]
    slots = {f"{n}-regularizer-{i}": r for n, some in every for i, r in enumerate(some)}
    looks = {slot: r for slot, r in slots.items() if hasattr(r, "build") and hasattr(r, "prepare")}
    return {slot: prepared(r, slot, spec, ctx) for slot, r in looks.items()}


def prepared(part: Any, slot: str, spec: Train, ctx: Context) -> dict[str, Tensor]:
    """What a part learns from the data before training; kept in the step's folder under the step's key, so it looks once."""
    kept = ctx.folder / f"prepared-{slot}.safetensors" if ctx.folder is not None else None
    if kept is not None and kept.exists():
        with safe_open(kept, "pt") as f:
            if f.metadata().get("key") == ctx.key:
                return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    found = part.prepare(ctx.base, ctx, _batches(spec, ctx))
    if kept is not None and found and ctx.world.main:
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {n: t.detach().cpu().contiguous() for n, t in found.items()},
            part_file := kept.with_suffix(".part"),
            {"key": ctx.key},
        )
        os.replace(part_file, kept)
    return found


def _batches(spec: Train, ctx: Context) -> Iterator[Batch]:
    """What training will see, batch by batch, with the model as the step found it; opened when the first is asked for."""
    still = Live(ctx.base, [])
    stream = spec.source.open(replace(ctx, live=still, views=Views(still, ctx.world, spec.micro, ctx.seed)))
    total = steps_of(spec, stream)
    for step in range(total):
        got = stream.batch(step, Progress(step, total))
        yield from got if isinstance(got, list) else [got]


def _player(
    name: str, live: Live, optimizer: Any, objectives: dict, regularizers: list, views: Views, spec: Train, ctx: Context,
    seen: dict[str, dict[str, Tensor]],
) -> Player:  # fmt: skip
    stepper = optimizer.build(list(live.params.values()), ctx)
    at_work = []
    for i, r in enumerate(regularizers):
        ctx.prepared = seen.get(f"{name}-regularizer-{i}", {})
        at_work.append(r.build(ctx.base, ctx) if hasattr(r, "build") else r)
    ctx.prepared = {}
    if spec.ema is not None and "ema" not in live.versions:
        live.mark("ema")  # the mean begins where the step does, so a part may read it in the first update
    return Player(name, live, optimizer, stepper, objectives, at_work, views, clip=spec.clip, ema=spec.ema)


def _hold(read: list[Any], views: Views) -> None:
    """The versions that these parts read are held from the beginning, of this player or of another they name."""
    for player, _, version in (n.rpartition(":") for p in read for n in getattr(p, "needs", ())):
        live = views.others[player] if player else views.live
        moved = any(not _zero(p) for part in live.parts for _, p in part.attached())
        if version not in live.versions and (version == "best" or (version == "start" and moved)):
            live.mark(version)  # `best` until the first look: as the step began


def _zero(piece: Any) -> bool:
    """Does this piece begin at no change? Then the step's start is simply the piece switched off."""
    return getattr(piece, "starts_at_zero", False)


def must_meet(players: list[Player], kinds: Iterable[str], field: str) -> None:
    """Refuse objectives none of which takes what the source gives: it would go through the data and learn nothing."""
    taken = {k: type(o).part_name for p in players for k, o in p.objectives.items()}
    if not set(taken) & set(kinds):
        rows = {"Pairs": "pairs (chosen, rejected)", "Tokens": "texts"}
        rows |= {"Rollout": "samples with rewards", "Labelled": "judged texts"}
        said = lambda names: " or ".join(rows.get(k, k) for k in names)
        mend = f"it takes {said(taken)}, and the source gives {said(kinds)}; choose an objective for that, or other rows"
        raise UserError(field, ", ".join(dict.fromkeys(taken.values())), mend)


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
    less: Container[str] = (),
) -> Trained:
    """Train, resumably. look(live, items) measures the skills watched while training; tell reports progress; of the skills
    in `less` less is better."""
    with in_training(spec, ctx) as players:
        return _trained(spec, ctx, players, folder, name, key, look, tell, every, less)


@contextlib.contextmanager
def in_training(spec: Train, ctx: Context, prepare: bool = True) -> Iterator[list[Player]]:
    """The players, on modules in the mode they train in; afterwards, however it ended, no piece hangs on them."""
    players: list[Player] = []
    try:
        for component in ctx.base.components.values():
            if spec.checkpointing:
                checkpointing(component)
            quiet_training(component)
        players += build_players(spec, ctx, prepare)
        yield players
    finally:
        for player in players:
            player.live.close()
        for component in ctx.base.components.values():
            component.eval()
            if spec.checkpointing:
                checkpointing(component, enabled=False)


def _trained(
    spec: Train,
    ctx: Context,
    players: list[Player],
    folder: Folder,
    name: str,
    key: str,
    look: Callable,
    tell: Callable,
    every: int,
    less: Container[str],
) -> Trained:
    stream = spec.source.open(ctx)
    total = steps_of(spec, stream)
    must_meet(players, getattr(stream, "yields", None) or spec.source.yields, f"{name}.train.objective")
    place, live = folder.path / "checkpoints" / name.replace("/", "."), players[0].live
    start, memory = _take_up(place, key, players, stream, tell)
    folder.log_cut(name, start)
    saved, tokens, seconds = time.monotonic(), memory.get("tokens", 0), memory.get("seconds", 0.0)
    stopped, best = memory.get("stopped", ""), memory.get("best")  # best: [value, step] of the best look
    better = lambda skill, a, b: a <= b if skill in less else a >= b

    def save(done: int) -> None:
        nonlocal saved
        saved = time.monotonic()
        flush()
        if folder.write:
            memory = {"key": key, "tokens": tokens, "seconds": seconds, "stopped": stopped, "best": best}
            _save(place, done, players, stream, memory, spec.save.keep)
        ctx.world.wait()

    def record(row: dict[str, Any]) -> None:
        nonlocal tokens, seconds
        tokens, seconds = tokens + row.get("tokens", 0), seconds + row["seconds"]
        append(row)
        tell("step", name=name, total=total, **row)

    def looked(done: int, items: int, skill: str | None) -> dict[str, float]:
        nonlocal best
        values = ctx.world.same(look(live, items))  # what is decided by them, every process decides alike
        append({"step": done, "skills": values})
        tell("look", name=name, step=done, skills=values)
        if spec.keep == "best" and skill and (best is None or not better(skill, best[0], values[skill])):
            best = [values[skill], done]
            live.mark("best")
        return values

    def after(done: int) -> bool:
        nonlocal stopped
        stop, last = spec.stop, spec.keep == "best" and done == total
        if stop and (done % stop.every == 0 or last):
            values = looked(done, stop.items, stop.skill)
            if better(stop.skill, values[stop.skill], stop.reach):
                stopped = f"{stop.skill} reached {values[stop.skill]:.3f} at step {done}"
        if every and (done % every == 0 or (last and not stop)) and not stopped:
            looked(done, 0, None if stop else "target")
        due = spec.save.steps and done % spec.save.steps == 0
        late = ctx.world.same(time.monotonic() - saved > spec.save.seconds)
        halt = ctx.world.same(asked.is_set())
        if (due or late or halt) and done < total:
            save(done)
        if halt and done < total and not stopped:
            raise Interrupted(
                f"Interrupted after step {done} of {total} of {name!r}; everything is saved. Go on with --resume."
            )
        return bool(stopped)

    done = start
    with folder.logging(name) as (append, flush), listening() as asked:
        if start < total and not stopped:
            try:
                done = train(players, stream, total, micro=spec.micro, start=start, record=record, after=after, round=ctx.round)
            except BaseException:
                with contextlib.suppress(Exception):
                    flush()
                raise
    if spec.keep != "live" and spec.keep in live.versions:  # (of a step of no updates there is only the live one)
        live.load_state_dict(live.state_dict() | {f"param/{n}": t for n, t in live.versions[spec.keep].items()})
    return Trained(live.delta().mapped(Tensor.cpu), done, tokens, seconds, stopped)


@contextlib.contextmanager
def listening():
    """An event set by Ctrl-C (and SIGTERM): the loop ends its step, saves, says how to go on. A second one ends at once."""
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
        if kept := {f"{i}/{n}": t for i, r in _remembering(p) for n, t in r.state_dict().items()}:
            tensors[f"{p.name}.regularizers"] = kept
        tensors[f"{p.name}.optimizer"], rest[p.name] = checkpoint.flatten_optimizer(p.stepper)
    source = stream.state_dict() if hasattr(stream, "state_dict") else {}
    if source.get("tensors"):
        tensors["source"] = source["tensors"]
    checkpoint.save(place, done, tensors, {**memory, "optimizers": rest, "source": source.get("json")}, keep)


def _remembering(player: Player) -> list[tuple[int, Any]]:
    return [(i, r) for i, r in enumerate(player.regularizers) if hasattr(r, "state_dict")]


def owners(players: list[Player]) -> list[str]:
    """The players that have a trainable of their own; the others share one of these."""
    return [p.name for i, p in enumerate(players) if all(p.live is not q.live for q in players[:i])]


def _take_up(place: Path, key: str, players: list[Player], stream: Any, tell: Callable) -> tuple[int, dict[str, Any]]:
    found = checkpoint.load_newest(place)
    for why in found[0]["damaged"] if found else ():
        tell("note", text=f"checkpoint passed over: {why}")
    if found is None or found[0].get("key") != key:
        return 0, {}
    state, tensors = found
    for p in players:
        if p.name in owners(players):
            p.live.load_state_dict(tensors[f"{p.name}.live"])
        kept = tensors.get(f"{p.name}.regularizers", {})
        for i, r in _remembering(p):
            r.load_state_dict({n.partition("/")[2]: t for n, t in kept.items() if n.startswith(f"{i}/")})
        checkpoint.unflatten_optimizer(p.stepper, tensors[f"{p.name}.optimizer"], state["optimizers"][p.name])
    if state.get("source") is not None or "source" in tensors:
        stream.load_state_dict({"tensors": tensors.get("source", {}), "json": state.get("source")})
    tell("note", text=f"resumed at step {state['step']}")
    return state["step"], state
