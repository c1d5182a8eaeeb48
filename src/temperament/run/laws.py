"""The exactness laws, each a measurement on real rows and the real model: what `check` runs before a training begins.

A gradient is a set of tensors by name. The distance of two, relative to the first,

    deviation = max over tensors t of  |g_t - h_t| / max(|g_t|, 0.1 |g|)

so that an error in one small tensor is not hidden by the large ones, and a tensor whose true gradient is zero (the bias of
keys) does not divide rounding by rounding. Allowed is 1e-5 in fp32, or ten times what rounding the input embeddings once does
to this very gradient, whichever is more: where a sure model's gradients cancel, that is all a computer can promise. A fault is
thousands of times larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from temperament.bases.probe import Answer, question
from temperament.engine import see
from temperament.engine.pictures import size_of
from temperament.nn import forward, logprobs
from temperament.nn.batch import Batch, Images, Rollout, Tokens
from temperament.nn.draws import generator
from temperament.protocols import Progress
from temperament.run.layouts import documents, padded, repacked, room, token_fields
from temperament.train.loop import Player, run_batch

Gradient = dict[str, Tensor]
# Rounding of one forward and backward, by the dtype it is computed in: sums are taken in another order, nothing else differs.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}

MEND = {
    "a gradient": "these rows teach nothing: see with `temper data` what carries loss, and that the trained places are used",
    "same twice": "something draws numbers without an address: set its dropout to 0, or use a part that draws by example",
    "rows together = one by one": "a mean is taken where a sum belongs: terms give sums and counts, the loop divides once",
    "padding": "padding reaches the loss or the attention: its weights must be 0 and its segments -1",
    "packed = one by one": "documents of a packed row see each other, or the objective counts rows: set pack: 0",
    "streamed = plain loss": "the loss of this architecture is streamed wrongly: report it, naming the base",
    "activations recomputed = kept": "this model computes otherwise the second time: set checkpointing: false",
    "off = base": "a part changes the model outside its pieces: it must leave base weights alone",
    "start = base": "an adapter begins at a change: mark its start, or begin at no change",
    "tied stays tied": "a part replaced a shared tensor by one of its own: train the shared one, or untie by a surgery",
    "merged = unmerged": "piece and change disagree; where a place is tied (embedding and head), leave it out of the targets",
    "trained tokens": "every example needs a token that carries loss: look with `temper data` at what the mask leaves",
    "documents apart": "packed examples share a segment and would see each other: number segments by document",
    "end of turn": "the model would never learn to stop: train the token that ends an answer (text in pieces: check: false)",
    "one BOS": "the chat template and the tokenizer both add the begin token: take it out of one",
}


@dataclass(frozen=True)
class Law:
    """One law as it was found on these rows."""

    name: str
    deviation: float
    tolerance: float
    detail: str = ""
    ok: bool | None = None

    def __post_init__(self):
        if self.ok is None:  # not (a > b): a deviation that is not a number does not hold
            object.__setattr__(self, "ok", bool(self.deviation <= self.tolerance))

    @property
    def mend(self) -> str:
        return MEND[self.name]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "deviation": self.deviation,
            "tolerance": self.tolerance,
            "ok": self.ok,
            "detail": self.detail,
        }


def not_asked(name: str, why: str) -> Law:
    return Law(name, 0.0, 0.0, why, ok=True)


# ---- gradients -------------------------------------------------------------------------------------------------------------


def gradient(player: Player, objective: Any, batch: Batch, micro: int) -> tuple[Gradient, float]:
    """The gradient the loop would take a step with, and the loss; the parameters' own .grad is left empty."""
    _clear(player)
    # A prepared batch is written to: each call gets its own.
    got = run_batch(player, objective, batch.select(range(len(batch))), Progress(0, 1), micro)
    return _taken(player), got.loss


def _taken(player: Player) -> Gradient:
    found = {n: p.tensor.grad for n, p in player.live.params.items() if p.tensor.grad is not None}
    _clear(player)
    return found


def _clear(player: Player) -> None:
    for p in player.live.params.values():
        p.tensor.grad = None


def distance(a: Gradient, b: Gradient) -> tuple[float, str]:
    """(deviation of b from a, name of the tensor that deviates most)."""
    norms = {n: float(torch.linalg.vector_norm(t.double())) for n, t in a.items()}
    least = 0.1 * math.sqrt(sum(x * x for x in norms.values()))
    worst, where = 0.0, ""
    for name in a.keys() | b.keys():
        x, y = a.get(name), b.get(name)
        apart = y.double() if x is None else x.double() if y is None else x.double() - y.double()
        scale = max(norms.get(name, 0.0), least)
        value = float(torch.linalg.vector_norm(apart))
        value = value / scale if scale else value
        if not value <= worst:
            worst, where = value, name
    return worst, where


def norm(g: Gradient) -> float:
    return math.sqrt(sum(float(torch.linalg.vector_norm(t.double())) ** 2 for t in g.values()))


def compared(name: str, plain: tuple[Gradient, float], other: tuple[Gradient, float], tolerance: float, detail: str) -> Law:
    value, where = distance(plain[0], other[0])
    loss = abs(plain[1] - other[1]) / max(
        abs(plain[1]), 1.0
    )  # advantages cancel in a loss: near zero it has no scale of its own
    value = max(value, loss) if math.isfinite(loss) else math.inf
    return Law(name, value, tolerance, f"{detail}; most in {where}" if where else detail)


# ---- gradient laws -----------------------------------------------------------------------------------------------------------


def gradient_laws(
    player: Player, objective: Any, batch: Batch, tolerance: float, packs: bool, split: str = ""
) -> Iterator[Law]:
    """split: why rows may not be computed apart (a part that couples its batch), or ""."""
    model, n = player.live.model, len(batch)
    whole = gradient(player, objective, batch, n)
    size = norm(whole[0])
    yield Law(
        "a gradient",
        0.0 if 0 < size < math.inf else math.inf,
        0.0,
        f"norm {size:.3g} over {len(whole[0])} of {len(player.live.params)} tensors",
    )
    noise = rounding(player, objective, batch, whole)
    tolerance = max(tolerance, min(10 * noise, 0.05))
    again = gradient(player, objective, batch, n)
    yield compared(
        "same twice",
        whole,
        again,
        0.0 if next(model.parameters()).device.type == "cpu" else tolerance / 10,
        "one batch, computed twice",
    )
    if split:
        yield not_asked("rows together = one by one", split)
    elif n > 1:
        yield compared(
            "rows together = one by one",
            whole,
            gradient(player, objective, batch, 1),
            tolerance,
            f"(1 x {n}) against ({n} x 1)",
        )
    else:
        yield not_asked("rows together = one by one", "the source gives one row at a time")
    if isinstance(batch, Images):
        yield not_asked("padding", "pictures are of one size")
    elif more := room(model, batch, 5):
        yield compared("padding", whole, gradient(player, objective, padded(batch, more), n), tolerance, f"{more} more columns")
    else:
        yield not_asked("padding", "the rows fill all positions of this model")
    yield _packing(player, objective, batch, whole, tolerance, packs, split)
    yield from _streaming(player, batch, tolerance)


def rounding(player: Player, objective: Any, batch: Batch, whole: tuple[Gradient, float]) -> float:
    """How far the gradient moves when every input embedding is moved by one rounding: the noise of this gradient."""
    model, world = player.live.model, player.views.world
    if isinstance(batch, Images):  # of every pixel, then
        sign = torch.randint(0, 2, batch.pixels.shape, generator=generator(0, "check/rounding")) * 2 - 1
        moved = replace(batch, pixels=batch.pixels * (1 + torch.finfo(batch.pixels.dtype).eps * sign))
        return distance(whole[0], gradient(player, objective, moved, len(batch))[0])[0]
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = table.weight if table is not None else next(p for p in model.parameters() if p.is_floating_point())
    eps = torch.finfo(weight.dtype).eps
    if torch.is_autocast_enabled(world.device.type) or world.accelerator.mixed_precision != "no":
        eps = max(eps, torch.finfo(torch.bfloat16 if world.accelerator.mixed_precision == "bf16" else torch.float16).eps)
    used = (
        torch.cat([t.ids.unique() for t in token_fields(batch)]).unique().to(weight.device)
        if table is not None
        else slice(None)
    )
    kept = weight.data[used].clone()
    sign = torch.randint(0, 2, kept.shape, generator=generator(0, "check/rounding")).to(kept) * 2 - 1
    try:
        weight.data[used] = kept * (1 + eps * sign)
        return distance(whole[0], gradient(player, objective, batch, len(batch))[0])[0]
    finally:
        weight.data[used] = kept


def _packing(
    player: Player, objective: Any, batch: Batch, whole: tuple[Gradient, float], tolerance: float, packs: bool, split: str
) -> Law:
    name, model = "packed = one by one", player.live.model
    if not isinstance(batch, Tokens):
        return not_asked(name, f"{type(batch).__name__} are never packed")
    if split:
        return not_asked(name, split)
    if not forward.can_pack(model):
        return not_asked(name, f"this model is never packed: {forward.packing(model).reason}")
    other = repacked(batch)
    law = compared(
        name, whole, gradient(player, objective, other, len(other)), tolerance, f"{len(batch)} rows against {len(other)}"
    )
    if not law.ok and not packs:
        return replace(
            law, ok=True, detail=law.detail + "; the source does not pack, and must not with this objective and base"
        )
    return law


def _streaming(player: Player, batch: Batch, tolerance: float) -> Iterator[Law]:
    """The log-prob primitive against the logits made whole."""
    name, model, world = "streamed = plain loss", player.live.model, player.views.world
    tokens = next(iter(token_fields(batch)), None)
    if tokens is None or forward.kind(model) != "decoder":
        yield not_asked(name, "no text is generated from left to right here")
        return
    tokens = tokens.to(world.device)
    size = max(int((tokens.weights != 0).sum()) // 3, 1)

    def streamed() -> Tensor:
        with _never_small():
            return logprobs.score(model, tokens, logprobs.label(), chunk=size)["label"]

    def plain() -> Tensor:
        logits = model(**forward.inputs(model, tokens)).logits[:, :-1]
        return torch.nn.functional.pad(logits.float().log_softmax(-1).gather(-1, tokens.ids[:, 1:, None])[..., 0], (1, 0))

    found = []
    for loss in (plain, streamed):
        _clear(player)
        with world.autocast():
            value = -(loss() * tokens.weights).sum() / tokens.weights.sum()
        with _never_small():  # chunks are made again in the backward
            value.backward()
        found.append((_taken(player), float(value.detach())))
    yield compared(name, *found, tolerance, f"chunks of {size} positions")


@contextmanager
def _never_small() -> Iterator[None]:
    was, logprobs.SMALL = logprobs.SMALL, 0
    try:
        yield
    finally:
        logprobs.SMALL = was


# ---- versions and the delta ------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model: nn.Module, rows: Tokens | Images, base: Any) -> Tensor:
    with forward.measuring(model):
        if isinstance(rows, Images):
            return see.said(model, base, rows).float()
        return model(**forward.inputs(model, rows)).logits.float()


def probe(base: Any) -> tuple[Tokens | Images, Tensor] | None:
    """(a row of ordinary tokens or of noise, what the pure base makes of it); None where the base takes neither."""
    model = base.model
    if see.names_pictures(base):
        pixels = torch.rand(2, 3, *size_of(base), generator=generator(0, "check/pixels")).to(forward.device_of(model))
        rows = Images(pixels, torch.arange(2), captions=["one", "another"] if base.tokenizer is not None else None)
        with base.at("base"):
            return rows, logits(model, rows, base)
    if (
        not hasattr(getattr(model, "config", None), "get_text_config")
        or forward.kind(model) != "decoder"
        or forward.head_of(model) is None
    ):
        return None
    ids = torch.tensor([forward.ordinary_ids(model)], device=forward.device_of(model))
    tokens = Tokens(ids, torch.ones(ids.shape), torch.zeros_like(ids), torch.zeros_like(ids))
    with base.at("base"):
        return tokens, logits(model, tokens, base)


@torch.no_grad()
def version_laws(
    player: Player, rows: Tokens | Images, before: tuple[Tokens | Images, Tensor], ties: list[tuple[str, ...]], tolerance: float
) -> Iterator[Law]:
    """before: `probe` of the base before anything was attached. The trained values must be away from their start."""
    tokens, of_base = before
    say = lambda rows: lambda model: logits(model, rows, player.live.base)
    yield from same_laws(player, say(tokens), say(rows), of_base, ties, tolerance)


@torch.no_grad()
def painter(base: Any) -> tuple[Any, Tensor] | None:
    """(what a generator is asked, what the pure base makes of it); None where the base makes no pictures."""
    if "denoiser" not in base.components:
        return None
    asked, answer = question(base), Answer(base)
    say = lambda model: answer(**asked)
    with base.at("base") as model:
        return say, say(model)


@torch.no_grad()
def same_laws(
    player: Player, say: Any, also: Any, of_base: Tensor, ties: list[tuple[str, ...]], tolerance: float
) -> Iterator[Law]:
    """say(model), also(model): what a version makes of some rows; of_base: what the pure base said of the first."""
    live, base = player.live, player.live.base
    apart = lambda x, y: float((x - y).abs().max()) / (float(y.abs().max()) or 1.0)
    with live.at("base") as model:
        yield Law("off = base", apart(say(model), of_base), 0.0, "bit for bit")
    with live.at("start") as model:
        marked = "start" in live.versions  # an adapter that moved weight into itself is the base up to rounding
        yield Law(
            "start = base",
            apart(say(model), of_base),
            tolerance if marked else 0.0,
            "the version `start` before the first step",
        )
    now = type(base.places).of(base.components).tied()
    yield Law("tied stays tied", float(len(set(ties) - set(now))), 0.0, f"{len(ties)} shared tensors")
    delta = live.delta()
    kept = sorted({how for how in delta.merges.values() if how != "exactly"})
    if kept:
        yield not_asked("merged = unmerged", f"what this adds merges {' and '.join(kept)}")
        return
    on = also(live.model)
    with live.at("base") as model:
        moved = apart(also(model), on)
    with live.at("base") as model, delta.applied(base.components):
        yield Law(
            "merged = unmerged",
            apart(also(model), on),
            tolerance,
            f"after a change that moves logits by {moved:.2g} of their size",
        )


@contextmanager
def perturbed(player: Player, seed: int, few_of: int = 12) -> Iterator[None]:
    """Trained values away from their start (an adapter that begins at zero teaches a check nothing): all of an adapter's,
    and of the base's own tensors the first of each role; by pointer, so that afterwards every bit is what it was."""
    undo, roles = [], set()
    try:
        for name, p in player.live.params.items():
            own = name in player.live.start
            role = (name.rpartition(".")[0].rpartition(".")[2], p.role)
            if not p.held.is_floating_point() or (own and (role in roles or len(roles) >= few_of)):
                continue
            if own:
                roles.add(role)
            old = p.held.data
            size = 0.02 if not own else 0.02 * float(old.float().std(correction=0)) + 1e-4
            noise = torch.randn(old.shape, generator=generator(seed, f"check/{name}")).to(old)
            undo.append((p.held, old))
            p.held.data = old + size * noise
        yield
    finally:
        for tensor, old in undo:
            tensor.data = old


# ---- data ------------------------------------------------------------------------------------------------------------------


def data_laws(batches: list[Batch], tokenizer: Any, ends: set[int]) -> Iterator[Law]:
    """Never in a batch: an example without loss, a masked end of turn, a doubled BOS, two examples in one document."""
    tokens = [t for b in batches for t in token_fields(b)]
    if not tokens:
        yield not_asked("trained tokens", "no tokens in these batches")
        return
    sampled = any(isinstance(b, Rollout) for b in batches)
    docs = [d for t in tokens for d in documents(t)]
    weights = [float(d["weights"].abs().sum()) for d in docs]
    total = sum(int((d["weights"] != 0).sum()) for d in docs)
    silent = sum(w == 0 for w in weights)
    yield Law(
        "trained tokens",
        float(silent),
        0.0,
        f"{total} of {sum(len(d['ids']) for d in docs)} tokens carry loss, in {len(docs)} examples",
    )
    mixed = sum(int((d["examples"].unique() >= 0).sum() > 1) for d in docs)
    yield Law("documents apart", float(mixed), 0.0, "one example a segment")
    if tokenizer is None:
        yield not_asked("end of turn", "this base has no tokenizer")
        return
    if sampled:
        yield not_asked("end of turn", "responses are the policy's own")
    elif not ends:
        yield not_asked("end of turn", "the tokenizer names no token that ends a turn")
    else:
        masked = trained = 0
        for d in docs:
            on = d["weights"] != 0
            end = torch.isin(d["ids"], torch.tensor(sorted(ends)))
            trained += bool((on & end).any())
            masked += bool((end[1:] & ~on[1:] & on[:-1] & ~end[:-1]).any())  # the end that would follow a trained token
        yield Law(
            "end of turn",
            float(masked if trained or masked else len(docs)),
            0.0,
            f"trained in {trained} of {len(docs)} examples",
        )
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None:
        twice = 0
        for d in docs:
            pair = (d["ids"][1:] == bos) & (d["ids"][:-1] == bos)
            twice += bool(pair[:1].any() if bos in ends else pair.any())
        yield Law("one BOS", float(twice), 0.0, "no example begins twice")
