"""The exactness law on the user's own model and data, in seconds, before anything is trained.

    check(recipe, base, world)    every train step: a few real rows through the real loop, laid out in all the ways that must
                                  not matter; deviations are returned, and above tolerance the run is refused

Nothing is left behind: weights, gradients, modes, versions, random state and files are what they were. What cannot be promised
(a base's own dropout, a part that declares an exception) is named under `exempt`, not tested. `resume.py` proves the other
half: that a run can be killed anywhere.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from temperament import parts
from temperament.bases.load import Base
from temperament.errors import TemperError, UserError
from temperament.nn.batch import Batch, Images, Rollout, Tokens
from temperament.protocols import Progress
from temperament.run import laws
from temperament.run.laws import Law
from temperament.run.layouts import few, token_fields
from temperament.run.recipe import Recipe, Step, Train
from temperament.run.resume import check_resume as check_resume
from temperament.run.training import NOISE, build_players, quiet_training, steps_of
from temperament.train.context import Context
from temperament.train.loop import Player, prepared
from temperament.train.world import World

ROWS = 4  # rows a law is measured on
LOOKS = 8  # batches of a file whose rows are read


def check(recipe: Recipe, base: Base, world: World) -> dict[str, Any]:
    """{"ok", "seconds", "steps": [{"name", "laws": [{name, deviation, tolerance, ok, detail}], "exempt": [...]}]}.

    Raises UserError in one sentence for the first law that does not hold.
    """
    began, out, seen, built = time.perf_counter(), [], [], False
    for step in _walk(recipe.steps):
        built = built or step.build is not None
        spec = step.train
        content = spec and parts.plain(replace(spec, steps=1, epochs=None))
        if spec is None or content in seen:
            continue
        seen.append(content)
        try:
            found, exempt = check_step(step, base, world, recipe)
        except TemperError as problem:
            if not built and not any(getattr(p, "inputs", ()) for p in _parts(spec)):
                raise
            # Its rows, or what its parts read, are made by a step that has not run yet.
            found, exempt = [], [f"not checked before the steps it reads are done ({problem})"]
        out.append({"name": step.name, "laws": [law.to_json() for law in found], "exempt": exempt})
        for law in found:
            if not law.ok:
                raise refused(step.name, law)
    return {"ok": True, "seconds": time.perf_counter() - began, "steps": out}


def refused(step: str, law: Law) -> UserError:
    value = (
        f"off by {law.deviation:.3g}, allowed {law.tolerance:.0e} ({law.detail})"
        if law.tolerance
        else f"broken ({law.deviation:.3g}; {law.detail})"
    )
    return UserError(f"{step}: the law '{law.name}'", value, law.mend)


def check_step(step: Step, base: Base, world: World, recipe: Recipe) -> tuple[list[Law], list[str]]:
    """(laws as found, what is exempt and why) of one train step, on the base's modules as they stand."""
    spec, seed, compute = step.train, recipe.seed, recipe.precision.compute
    with untouched(base), tempfile.TemporaryDirectory() as scratch:
        ties = base.places.tied()
        ctx = Context(base, world, seed, max(spec.batch, ROWS), spec.micro, Path(scratch),
                      aides=recipe.aides, inference=recipe.inference)  # fmt: skip
        noise = noisy(base)
        for module in base.components.values():
            quiet_training(module)
        before, painted = laws.probe(base), laws.painter(base)  # what the base says before anything is attached
        players = build_players(replace(spec, micro=max(spec.micro, ROWS)), ctx, prepare=False)
        try:
            batches = first_batches(spec, ctx)
            found = list(laws.data_laws(batches, base.tokenizer, ends(base)))
            dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[compute] or next(
                base.model.parameters()
            ).dtype
            kinds = set()
            for player in players:
                for batch in batches:
                    objective = player.objectives.get(kind := type(batch).__name__)
                    if objective is None or (player.name, kind) in kinds:
                        continue
                    kinds.add((player.name, kind))
                    found += list(
                        _player_laws(player, players, batch, ties, before, painted, laws.TOLERANCE[dtype], seed, spec)
                    )
        finally:
            for player in players:
                player.live.close()
    exempt = [f"{type(p).part_name}: {', '.join(p.part_declares)}" for p in _parts(spec) if getattr(p, "part_declares", ())]
    exempt += [f"the base: {noise}"] * bool(noise)
    return found, exempt


def _player_laws(
    player: Player,
    players: list[Player],
    batch: Batch,
    ties: list,
    before: Any,
    painted: Any,
    tolerance: float,
    seed: int,
    spec: Train,
) -> Iterator[Law]:
    packs, kind = any(t.packed for t in token_fields(batch)), type(batch).__name__
    rows, objective = few(batch, ROWS), player.objectives[kind]
    trained = spec.trainable if player is players[0] else spec.players[player.name].trainable
    declared = [d for p in (objective, *player.regularizers, *trained) for d in getattr(p, "part_declares", ())]
    split = next((f"a part declares: {d}" for d in declared if d in ("couples the batch", "approximate gradient")), "")
    tokens = rows if isinstance(rows, Images) else next(iter(token_fields(rows)), None)
    with laws.perturbed(player, seed):
        rows = _unlike(rows, player) if isinstance(rows, Rollout) else rows
        for earlier in players[: players.index(player)]:  # what their objectives fill into a batch, this one may read
            if kind in earlier.objectives:
                with earlier.live.at("live"):
                    prepared(earlier, earlier.objectives[kind], rows, Progress(0, 1))
        with player.live.at("live"):
            yield from laws.gradient_laws(player, objective, rows, tolerance, packs, split)
            if spec.checkpointing:
                yield _recomputed(player, objective, rows, tolerance)
            if tokens is not None and before is not None:
                yield from laws.version_laws(
                    player, tokens.to(player.views.world.device), before, ties, 5 * max(tolerance, 1e-5)
                )
            elif painted is not None:
                say, of_base = painted
                yield from laws.same_laws(player, say, say, of_base, ties, 5 * max(tolerance, 1e-5))


def _unlike(rows: Rollout, player: Player) -> Rollout:
    """One group of responses that differ, half of them rewarded, sampled by a policy near this one: a sure policy samples the
    same again and again, and responses that are alike cancel, which would leave no gradient to compare. This policy finds the
    rewarded ones less likely, and the others more: no clip holds that, however narrow."""
    odd = torch.arange(len(rows))[:, None] % 2 == 1
    if isinstance(rows.tokens, Tokens):
        first = (rows.tokens.weights != 0).float().cumsum(1).eq(1) & (rows.tokens.weights != 0)
        ids = torch.where(first & odd, torch.where(rows.tokens.ids > 0, rows.tokens.ids - 1, 1), rows.tokens.ids)
        rows = replace(rows, tokens=replace(rows.tokens, ids=ids))
    rows = replace(rows, group=torch.zeros(len(rows), dtype=torch.long), rewards=odd[:, 0].float())
    near = player.views.precompute("live", rows, lambda model, r: r.tokens.logp(model))
    return replace(rows, behaviour=near + torch.where(odd, 0.05, -0.05))


def _recomputed(player: Player, objective: Any, rows: Batch, tolerance: float) -> Law:
    from temperament.nn.context import checkpointing

    plain = laws.gradient(player, objective, rows, len(rows))
    components = player.live.base.components.values()
    try:
        for module in components:
            checkpointing(module)
            quiet_training(module)
        again = laws.gradient(player, objective, rows, len(rows))
    finally:
        for module in components:
            checkpointing(module, False)
            quiet_training(module)
    return laws.compared("activations recomputed = kept", plain, again, tolerance, "gradient checkpointing")


# ---- what it is measured on -------------------------------------------------------------------------------------------------


def first_batches(spec: Train, ctx: Context) -> list[Batch]:
    """The first batches of the source; of one that generates, the smallest that it can give."""
    generates = online(spec.source)
    if not generates:
        stream = spec.source.open(ctx)
    else:
        for ctx.batch in (b for b in range(ROWS, spec.batch) if spec.batch % b == 0):
            with suppress(UserError):
                stream = spec.source.open(ctx)
                break
        else:
            ctx.batch = spec.batch
            stream = spec.source.open(ctx)
    total = steps_of(spec, stream)
    batches: list[Batch] = []
    began = time.perf_counter()
    for step in range(1 if generates else max(min(LOOKS, total), 1)):
        if step and ctx.world.same(time.perf_counter() - began > 0.5):
            break
        got = stream.batch(step, Progress(step, max(total, 1)))
        batches += got if isinstance(got, list) else [got]
    return batches


def online(source: Any) -> bool:
    """Does this source generate its rows with the model that is trained?"""
    return any(getattr(p, "generates", False) for p in parts.walk(source))


def ends(base: Base) -> set[int]:
    """Ids of the tokens that end a turn: of the tokenizer, the chat template, and what generation stops at."""
    tokenizer, found = base.tokenizer, set()
    if tokenizer is None:
        return found
    stops = getattr(getattr(base.model, "generation_config", None), "eos_token_id", None)
    found |= {i for i in (stops if isinstance(stops, list) else [stops], [tokenizer.eos_token_id]) for i in i if i is not None}
    if getattr(tokenizer, "chat_template", None):
        from temperament.engine.chat import Template, resolve_template

        with suppress(Exception):  # a template that cannot be read is the data room's to refuse
            found |= {tokenizer.convert_tokens_to_ids(t) for t in Template(tokenizer, resolve_template(tokenizer, None)).ends}
    return found


def noisy(base: Base) -> str:
    """What the base would draw while training if the loop let it, in words, or ""."""
    for component in base.components.values():
        for name, m in component.named_modules():
            rates = [m.p] if isinstance(m, nn.modules.dropout._DropoutNd) else [vars(m).get(n, 0.0) for n in NOISE]
            if any(isinstance(r, float) and r > 0 for r in rates):
                return f"its own dropout ({name}) draws in order of calls and is off in training"
    return ""


def _walk(steps: list[Step]) -> Iterator[Step]:
    from temperament.run.recipe import walk_steps

    return walk_steps(steps)


def _parts(spec: Train) -> Iterator[Any]:
    from temperament.run.artefacts import walk_all

    return walk_all(spec)


@contextmanager
def untouched(base: Base) -> Iterator[None]:
    """Everything a check may move is put back: gradients and whether they are wanted, modes, originals, random state."""
    tensors = [(p, p.requires_grad, p.grad) for _, p in base.parameters()]
    modules = [m for c in base.components.values() for m in c.modules()]
    modes = [(m, m.training, {n: m.__dict__[n] for n in NOISE if isinstance(m.__dict__.get(n), float)}) for m in modules]
    buffers = [
        (b, b.clone()) for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm) for b in m.buffers(recurse=False)
    ]
    originals, state = dict(base.originals), (random.getstate(), np.random.get_state())
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            for p, _, _ in tensors:
                p.grad = None
            yield
        finally:
            for p, wanted, grad in tensors:
                p.requires_grad_(wanted)
                p.grad = grad
            for module, mode, rates in modes:
                module.training = mode
                module.__dict__.update(rates)
            with torch.no_grad():
                for buffer, was in buffers:
                    buffer.copy_(was)
            base.originals = originals
            random.setstate(state[0])
            np.random.set_state(state[1])
