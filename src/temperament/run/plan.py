"""What a recipe will take, before it takes it: memory, time, disk.

    plan(recipe, base)            base: loaded, or `shapes(recipe)` - its configuration alone, no weights

    memory    weights + what they were (to go back to) + gradients + optimizer + activations of the largest micro-batch, as
              the loop itself allocates them on tensors without storage (dry.py); for a process on the CPU its libraries come
              on top, and what its allocator keeps, seen in one dry step
    time      one dry step of the run's own rows, timed, times the steps; without weights, multiplications over measured speed
    disk      checkpoints kept + the change
    floor     what no program could do without: weights, gradients and optimizer state of what is trained; the multiplications
              at the speed at which this machine multiplies matrices

Where it does not fit, the cheapest change that would is found by planning it.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from temperament.bases.image_settings import image_settings
from temperament.bases.load import Base
from temperament.bases.pipeline import pipeline_of, shells
from temperament.errors import TemperError
from temperament.nn.batch import Batch, Pairs, Rollout, Tokens
from temperament.parts import walk
from temperament.protocols import Progress
from temperament.run.check import online, untouched
from temperament.run.dry import META, Counting, Shapes, fused_attention, shapes_of
from temperament.run.layouts import token_fields
from temperament.run.memory import resident, watch
from temperament.run.recipe import Recipe, Step, Train
from temperament.run.training import in_training, must_meet, steps_of
from temperament.train.context import Context
from temperament.train.loop import Player, run_batch
from temperament.train.world import World

SAMPLED = ("Rollout", "Tokens", "Pairs")  # what can be laid out before anything is sampled
LOOK = 1.0  # seconds spent looking for the longest rows


@dataclass(frozen=True)
class NoStep:
    """Stands for the optimizer while shapes run: nothing is allocated or moved."""

    lr: float = 0.0

    def build(self, parameters: list[Any], ctx: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p.tensor for p in parameters], lr=0.0)


def cannot_foresee(spec: Any) -> str:
    """Why a step cannot be laid out before the run: it reads what an earlier step is yet to leave, or what it samples has no
    length that is known."""
    from temperament.run.artefacts import walk_all

    read = [name for p in walk_all(spec) for name in getattr(p, "inputs", ())]
    if read:
        return f"it reads what {read[0]!r} leaves"
    if online(spec.source) and not set(spec.source.yields) <= set(SAMPLED):
        return "its rows are sampled from the model as it trains"
    path = getattr(spec.source, "path", "")
    if path and not Path(path).exists() and not path.count("/"):
        return f"its rows are what {path!r} leaves"
    return ""


def plan(recipe: Recipe, base: Base, dry: bool = True) -> dict[str, Any]:
    """{"predicted": {peak_bytes, seconds, disk_bytes, tokens}, "floor", "memory", "steps", "fits", "available_bytes", ...}."""
    world, began = World(recipe.precision.compute, device=recipe.device), time.perf_counter()
    real = next(base.model.parameters()).device != META
    meta = Base(
        base.id,
        {n: shapes_of(m) for n, m in base.components.items()},
        base.processors,
        base.folder,
        dict(base.sha256) or {"": ""},
    )
    weights = bytes_of(p for _, p in base.parameters())
    process = resident() - weights * (real and not cuda(world)) if not cuda(world) else 0
    steps, foreseen, unforeseen = [], [], []
    for step in _trains(recipe):
        why = cannot_foresee(step.train)
        try:
            found = {} if why else of_step(step, recipe, meta, world)
            if found and real and dry:
                found |= timed(step, recipe, base, world, found)
        except TemperError:
            raise
        except Exception as problem:  # a plan is advice: what shapes cannot run, numbers may
            why = f"it could not be tried beforehand ({type(problem).__name__}: {str(problem).partition(chr(10))[0]})"
        if why:
            unforeseen.append({"name": step.name, "why": why})
        else:
            foreseen.append(step)
            steps.append({"name": step.name, **found})
    speed = multiplications_a_second(world, recipe.precision.compute)
    for s in steps:
        s.setdefault("seconds", s["flops"] * s["steps"] / (0.4 * speed))
    most = max(steps, key=lambda s: s["memory"]["total"], default=None)
    available = available_bytes(world) + (weights if real else 0)
    peak = process + (most["memory"]["total"] if most else weights)
    out = {
        "predicted": {
            "peak_bytes": peak,
            "seconds": sum(s["seconds"] for s in steps),
            "disk_bytes": sum(s["disk_bytes"] for s in steps),
            "tokens": sum(s["tokens"] for s in steps),
        },
        "floor": {
            "peak_bytes": max((s["memory"]["floor"] for s in steps), default=weights) + process,
            "seconds": sum(s["flops"] * s["steps"] for s in steps) / speed,
        },
        "memory": (most["memory"] if most else {"weights": weights}) | {"process": process},
        "available_bytes": available,
        "fits": peak - process <= available,
        "master": recipe.precision.master,
        "steps": steps,
        "unforeseen": unforeseen,
        "took": time.perf_counter() - began,
    }
    if not out["fits"]:
        out["mend"] = (
            cheapest(replace(recipe, steps=foreseen), meta, world, available)
            or "no change of this recipe fits here: take a smaller base or a larger machine"
        )
    return out


def shapes(recipe: Recipe) -> Base:
    """The base a recipe names, from its configuration alone: no weights are read, so any size can be planned anywhere."""
    import transformers

    from temperament.bases.load import DTYPES, _model_class, locate, shell

    with META:
        ours = shell(locate(recipe.base))
    if ours is not None:
        return Base(recipe.base, {"policy": ours.to(DTYPES[recipe.precision.master]).eval()}, sha256={"policy": "shapes"})
    if (found := pipeline_of(recipe.base, locate(recipe.base), "base")) is not None:
        with META:
            made, processors = shells(found, recipe.base, DTYPES[recipe.precision.master], "base")
        return Base(recipe.base, made, processors, sha256=dict.fromkeys(made, "shapes"))
    source = str(locate(recipe.base) or recipe.base)
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=recipe.trust_remote_code)
    kind, component = _model_class(config, transformers)
    with META:
        model = kind.from_config(config, dtype=DTYPES[recipe.precision.master])
    processors = {"image": found} if (found := image_settings(source, locate(recipe.base))) is not None else {}
    with contextlib.suppress(Exception):
        processors["tokenizer"] = transformers.AutoTokenizer.from_pretrained(source)
    return Base(recipe.base, {component: model.eval()}, processors, sha256={component: "shapes"})


# ---- one step ----------------------------------------------------------------------------------------------------------------


def of_step(step: Step, recipe: Recipe, meta: Base, world: World) -> dict[str, Any]:
    """Memory, multiplications, disk and tokens of a train step, from shapes."""
    spec = step.train
    with (
        untouched(meta),
        tempfile.TemporaryDirectory() as scratch,
        players_on(meta, spec, recipe, world, scratch) as (players, ctx, counting),
    ):
        live = players[0].live
        rows, steps, tokens, assumed = largest(spec, ctx)
        params = [p for player in players for p in player.live.params.values()]
        trained = bytes_of(p.tensor for p in params)
        weights = bytes_of(p for _, p in meta.parameters())
        adapters = bytes_of(p.tensor for p in params if p.name not in live.start)
        state = sum(bytes_of([p.tensor]) * optimizer_share(spec, p) for p in params)
        counting.flops = 0
        before = counting.now
        must_meet(players, [type(rows).__name__], f"{step.name}.train.objective")
        for player in players:
            objective = player.objectives.get(type(rows).__name__)
            if objective is not None:
                with fused_attention(counting), counting:
                    run_batch(player, objective, rows, Progress(0, 1), spec.micro)
        micros = -(-len(rows) // spec.micro)
        share = -(-spec.batch // spec.micro) / world.size / micros
        peak = counting.peak
    kept = before - weights - adapters
    versions = trained * ((spec.ema is not None) + (spec.keep == "best"))
    activations = max(peak - before - trained, 0)
    total = peak + state + versions
    cache = generation(spec, meta, ctx)
    return {
        "memory": {
            "weights": weights,
            "adapters": adapters,
            "originals": kept,
            "gradients": trained,
            "optimizer": state,
            "versions": versions,
            "activations": activations,
            "generation": cache,
            "total": max(total, before + state + versions + cache),
            "floor": weights + adapters + trained + state,
        },
        "rows": {
            "micro": min(spec.micro, len(rows)),
            "longest": max((t.ids.shape[1] for t in token_fields(rows)), default=0),
            "assumed": assumed,
        },
        "flops": counting.flops * share,
        "steps": steps,
        "samples": online(spec.source),  # rows that the model makes: their time is in no number
        "tokens": tokens,
        "disk_bytes": int((trained * (2 if kept else 1) + state + versions) * (spec.save.keep + 1) + trained),
    }


@contextlib.contextmanager
def players_on(
    base: Base, spec: Train, recipe: Recipe, world: World, scratch: str
) -> Iterator[tuple[list[Player], Context, Shapes]]:
    """The players of a step on a base of shapes, every byte counted."""
    ctx = Context(
        base, world, recipe.seed, spec.batch, spec.micro, Path(scratch), aides=recipe.aides, inference=recipe.inference
    )
    counting = Shapes()
    for _, p in base.parameters():
        counting.see(p)
    with contextlib.ExitStack() as stack:
        with counting:
            players = stack.enter_context(in_training(replace(spec, optimizer=NoStep()), ctx, prepare=False))
        yield players, ctx, counting


def largest(spec: Train, ctx: Context) -> tuple[Batch, int, int, str]:
    """(rows like the largest micro-batch, twice if there are several; steps; tokens in all; what had to be assumed)."""
    assumed, batches, stream = "", [], None
    try:
        stream = spec.source.open(ctx)
        steps = steps_of(spec, stream)
    except (TemperError, AttributeError, TypeError) as problem:
        assumed, steps = f"rows of 512 tokens ({problem})", spec.steps or 1000
    if stream is not None and hasattr(stream, "largest"):
        batches = [stream.largest()]
    elif stream is not None and online(spec.source):
        batches = [_sampled(spec, stream, ctx)]
    elif stream is not None:
        began = time.perf_counter()
        for step in range(max(min(steps, getattr(stream, "steps_per_epoch", steps)), 1)):
            got = stream.batch(step, Progress(step, max(steps, 1)))
            batches += got if isinstance(got, list) else [got]
            if ctx.world.same(time.perf_counter() - began > LOOK):
                break
    if not batches:
        length = min(512, getattr(getattr(ctx.base.model, "config", None), "max_position_embeddings", 512) or 512)
        batches = [_blank(spec.batch, length, length, ctx)]
    wide = lambda b: sum(t.ids.shape[1] for t in token_fields(b)) * min(len(b), spec.micro)
    carrying = lambda b: sum(float((t.weights != 0).sum()) for t in token_fields(b))
    most = max(batches, key=lambda b: (wide(b), carrying(b)))
    tokens = sum(int(t.mask.sum()) for b in batches for t in token_fields(b))
    n = min(spec.micro, len(most))
    # The micro-batch with the most tokens that carry loss: their logits are the largest tensors there are.
    first = max(
        range(0, len(most), n), key=lambda i: carrying(most.select(range(i, min(i + n, len(most))))) * (i + n <= len(most))
    )
    rows = most.select([*range(first, first + n)] * (2 if len(most) > n else 1))
    return rows, steps, round(tokens / len(batches) * steps), assumed


def _sampled(spec: Train, stream: Any, ctx: Context) -> Batch:
    """What a source that generates will give at most: its longest prompt, and every token it may sample."""
    prompts = [len(p.ids) for p in getattr(stream, "prompts", ()) if hasattr(p, "ids")]
    asked, new = getattr(stream, "asked_tokens", max(prompts, default=64)), sampling(spec)[1]
    return _blank(spec.batch, asked + new, new, ctx, spec.source.yields[0])


def sampling(spec: Train) -> tuple[int, int]:
    """(responses a source samples together, tokens of the longest), at most."""
    asked = [p for p in walk(spec.source) if getattr(p, "generates", False)]
    tokens = [getattr(p, "answer_tokens", getattr(p, "max_new", None)) for p in walk(spec.source)]
    together = [getattr(p, "together", spec.batch) for p in asked]
    return max(together, default=0), max((t for t in tokens if isinstance(t, int)), default=256)


def _blank(n: int, length: int, trained: int, ctx: Context, kind: str = "Tokens") -> Any:
    ids = torch.ones(n, length, dtype=torch.long)
    weights = (torch.arange(length) >= max(length - trained, 1)).float().expand(n, -1).clone()
    tokens = Tokens(ids, weights, torch.zeros_like(ids), torch.zeros_like(ids))
    if kind == "Pairs":
        return Pairs(tokens, tokens)
    if kind == "Rollout":
        return Rollout(tokens, torch.zeros(n, length), torch.arange(n) % 2 * 1.0, torch.zeros(n, dtype=torch.long))
    return tokens


def optimizer_share(spec: Train, p: Any, known: dict = {}) -> float:  # noqa: B006 - a cache
    """Bytes of state an optimizer keeps for a byte of this tensor: measured on a small one of the same kind."""
    key = (repr(spec.optimizer), p.tensor.dim(), p.tensor.dtype, p.role)  # by repr: an option may be a list
    if key not in known:
        small = nn.Parameter(torch.ones((16,) * p.tensor.dim(), dtype=p.tensor.dtype))
        part = spec.optimizer
        with contextlib.suppress(Exception):
            from temperament.parts import at

            part = at(part, Progress(0, 1))
        stepper = part.build([replace(p, tensor=small, base=None)], None)
        small.grad = torch.zeros_like(small)
        stepper.step()
        known[key] = bytes_of(t for t in stepper.state[small].values() if isinstance(t, Tensor) and t.dim()) / bytes_of([small])
    return known[key]


def generation(spec: Train, base: Base, ctx: Context) -> int:
    """Keys and values of the responses a source samples together."""
    if not online(spec.source):
        return 0
    config = getattr(base.model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    if text is None or not hasattr(text, "num_hidden_layers"):
        return 0
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rows, new = sampling(spec)
    itemsize = next(base.model.parameters()).dtype.itemsize
    return 2 * text.num_hidden_layers * heads * width * (new + 64) * rows * itemsize


# ---- one step with numbers -------------------------------------------------------------------------------------------------


def timed(step: Step, recipe: Recipe, base: Base, world: World, found: dict[str, Any]) -> dict[str, Any]:
    """Seconds, from one dry step of the real model and rows; nothing is kept. verified_bytes: the most its tensors took, to
    hold against the predicted total less the optimizer. memory.allocator: what the process grew beyond its tensors (on a CPU,
    malloc keeps freed blocks for later; up to as much again)."""
    spec = step.train
    with untouched(base), tempfile.TemporaryDirectory() as scratch:
        ctx = Context(
            base, world, recipe.seed, spec.batch, spec.micro, Path(scratch), aides=recipe.aides, inference=recipe.inference
        )
        with in_training(replace(spec, optimizer=NoStep()), ctx, prepare=False) as players:
            rows, _, _, assumed = largest(spec, ctx)
            met = [player for player in players if type(rows).__name__ in player.objectives]
            if not met or (assumed and base.tokenizer is None):
                return {}
            once = lambda batch: _once(met, batch, spec.micro)
            known = [p for _, p in base.parameters()]
            for player in players:
                known += [*(p.tensor for p in player.live.params.values()), *player.live.start.values()]
            known = list({id(t): t for t in known}.values())  # players may share what they train
            before, peak = resident(), watch()
            first = world.same(once(rows))  # also warms up; every process goes on alike
            extra = 0 if cuda(world) else peak() - before
            one = rows.select(range(min(spec.micro, len(rows))))
            seconds = first * len(one) / len(rows) if first > 1.0 else once(one)
            counting = Counting()
            if first < 1.0:
                for tensor in known:
                    counting.see(tensor)
                with counting:
                    once(rows)
            total = found["memory"]["total"] - found["memory"]["optimizer"] - found["memory"]["versions"]
            extra = max(extra - (total - bytes_of(known)), 0) if extra else 0
    micros = -(-spec.batch // spec.micro) / world.size
    # The longest rows were timed; the mean row costs its share of tokens.
    mean = found["tokens"] / max(found["steps"], 1) / spec.batch
    longest = sum(float(t.mask.sum()) for t in token_fields(one)) / max(len(one), 1)
    share = min(mean / longest, 1.0) if longest and mean else 1.0
    memory = found["memory"] | {"allocator": extra, "total": found["memory"]["total"] + extra}
    return {"seconds": seconds * micros * share * found["steps"], "verified_bytes": counting.peak or None, "memory": memory}


def _once(players: list[Player], rows: Batch, micro: int) -> float:
    """Seconds of one forward and backward of each; the gradients are dropped."""
    began, rows = time.perf_counter(), rows.select(range(len(rows)))  # what one leaves in them the next one reads
    for player in players:
        run_batch(player, player.objectives[type(rows).__name__], rows, Progress(0, 1), micro)
        if cuda(player.views.world):
            torch.cuda.synchronize()
        for p in player.live.params.values():
            p.tensor.grad = None
    return time.perf_counter() - began


# ---- the machine -------------------------------------------------------------------------------------------------------------


def cuda(world: World) -> bool:
    return world.device.type == "cuda"


def bytes_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def available_bytes(world: World) -> int:
    if cuda(world):
        return torch.cuda.mem_get_info(world.device)[0]
    import psutil

    return psutil.virtual_memory().available


def multiplications_a_second(world: World, compute: str) -> float:
    """Of square matrices in the dtype of the run: what this machine can do at best."""
    n = 4096 if cuda(world) else 512
    a = torch.ones(
        n, n, dtype={"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[compute], device=world.device
    )
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        a @ a
        if cuda(world):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


# ---- when it does not fit ----------------------------------------------------------------------------------------------------


def cheapest(recipe: Recipe, meta: Base, world: World, available: int) -> str:
    """The first change, from free to costly, with which every step fits; planned, not guessed."""
    from temperament.parts import build

    micro = max((s.train.micro for s in _trains(recipe)), default=1)
    changes: list[tuple[str, dict[str, Any]]] = []
    while micro > 1:
        micro //= 2
        changes.append((f"micro: {micro} (changes no result)", {"micro": micro}))
    changes.append(("checkpointing: true (about a third more time, changes no result)", {"checkpointing": True}))
    changes.append(("micro: 1 and checkpointing: true (slower, changes no result)", {"micro": 1, "checkpointing": True}))
    if any(type(t).part_name.startswith("select.") for s in _trains(recipe) for t in s.train.trainable):
        lora = [build("adapters.lora")]
        changes.append(("trainable: adapters.lora (another method: fewer weights to learn with)", {"trainable": lora}))
        changes.append(
            ("trainable: adapters.lora, micro: 1, checkpointing: true", {"trainable": lora, "micro": 1, "checkpointing": True})
        )
    for words, change in changes:
        with contextlib.suppress(Exception):  # what cannot be planned is not proposed
            peaks = [
                of_step(replace(s, train=replace(s.train, **change)), recipe, meta, world)["memory"]["total"]
                for s in _trains(recipe)
            ]
            if peaks and max(peaks) <= available:
                return words
    return ""


def _trains(recipe: Recipe) -> list[Step]:
    from temperament.run.recipe import walk_steps

    return [s for s in walk_steps(recipe.steps) if s.train]
