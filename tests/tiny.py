"""Tiny bases, contexts and random batches: what tests of parts are made of. Inputs are fresh in every run."""

import secrets
from pathlib import Path
from typing import Any

import torch
from models import MODELS, VOCAB
from torch import Tensor

from temperament import parts
from temperament.bases.image_settings import ImageSettings
from temperament.bases.load import Base
from temperament.bases.train_vision import tokenizer
from temperament.bases.worlds import sprites
from temperament.nn.batch import Images, Pairs, Rollout, Steps, Tokens
from temperament.nn.policy import Policy, PolicyConfig
from temperament.protocols import Progress
from temperament.train.context import Context
from temperament.train.live import Live
from temperament.train.loop import Player, Views, run_batch
from temperament.train.world import World

WORLD = World()


def seed() -> int:
    return secrets.randbits(30)


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(seed())


def tiny(name: str = "llama", dtype: torch.dtype = torch.float32) -> Base:
    """A base of random weights with every parameter shaken; no tokenizer."""
    return Base(f"tiny/{name}", {"lm": MODELS[name].build(seed()).to(dtype)})


def context(base: Base, **more: Any) -> Context:
    return Context(base, WORLD, **{"seed": seed(), "batch": 8, "micro": 8, **more})


def live(base: Base, *trainables: Any, **more: Any) -> Live:
    ctx = context(base, **more)
    return Live(base, [parts.build(t).build(base, ctx) for t in trainables or ("select.full",)])


@torch.no_grad()
def shake(it: Live, by: float = 0.1) -> Live:
    """Random values in every trained tensor: an adapter far from its start."""
    r = rng()
    for p in it.params.values():
        p.tensor.add_(by * torch.randn(p.tensor.shape, generator=r).to(p.tensor))
    return it


def tokens(rows: int = 5, length: int = 9, weighted: bool = True, packed: bool = False) -> Tokens:
    """Right-padded rows of random lengths; random loss weights, some 0; optionally two documents in a row."""
    r, ids = rng(), torch.randint(5, VOCAB, (rows, length), generator=rng())
    n = torch.randint(3, length + 1, (rows, 1), generator=r)
    n[0] = length
    at = torch.arange(length)
    segments = torch.where(at < n, 0, -1)
    if packed:
        segments = torch.where((at >= n // 2) & (at < n) & (n // 2 >= 2) & (n - n // 2 >= 2), 1, segments)
    weights = torch.rand(rows, length, generator=r) + 0.1 if weighted else torch.ones(rows, length)
    first = torch.cat([torch.ones(rows, 1, dtype=torch.bool), segments[:, 1:] != segments[:, :-1]], 1)
    weights = weights * (segments >= 0) * ~first * (torch.rand(rows, length, generator=r) < 0.8)
    weights[:, 1] = torch.where(first[:, 1], weights[:, 1], 1.0)  # at least one a row
    examples = torch.where(segments >= 0, torch.randint(0, 1 << 20, (rows, 1), generator=r) + segments, -1)
    return Tokens(torch.where(segments >= 0, ids, 0), weights, segments, examples)


def pairs(rows: int = 5) -> Pairs:
    one = lambda: tokens(rows, weighted=False)
    return Pairs(one(), one())


def rollout(rows: int = 8, group: int = 4) -> Rollout:
    """behaviour near what a random model says, so that ratios fall on both sides of the clip."""
    t, r = tokens(rows, weighted=False), rng()
    behaviour = torch.log(torch.full(t.ids.shape, 1 / VOCAB)) + 0.3 * torch.randn(t.ids.shape, generator=r)
    return Rollout(t, behaviour, torch.randn(rows, generator=r), torch.arange(rows) // group)


def policy() -> Base:
    """A policy of random weights in a world of its own: 6 numbers seen, 2 done, 3 steps a plan."""
    torch.manual_seed(seed())
    return Base("tiny/policy", {"policy": Policy(PolicyConfig("none", 6, 2, 3, 3, 16, 2)).eval()})


def steps(rows: int = 5, length: int = 9) -> Steps:
    """Episodes of random lengths, whose decisions are plans."""
    r = rng()
    n = torch.randint(1, length + 1, (rows, 1), generator=r)
    n[0] = length
    return Steps(
        torch.randn(rows, length, 6, generator=r), torch.randn(rows, length, 6, generator=r), (torch.arange(length) < n).float()
    )


def seeing(name: str = "vit") -> Base:
    """A base of random weights that takes pictures of 16x16: "vit", "resnet" (its BatchNorm away from its start) or "clip"."""
    model = MODELS[name].build(seed())
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.uniform_(-0.2, 0.2, generator=rng()), m.running_var.uniform_(0.5, 2.0, generator=rng())
    processors = {"image": ImageSettings({"size": 16, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.25]})}
    if name == "clip":
        return Base("tiny/clip", {"encoder": model}, processors | {"tokenizer": tokenizer()})
    return Base(f"tiny/{name}", {"image_encoder": model}, processors)


def images(rows: int = 5) -> Images:
    """Noise, with labels of five classes and captions of which some come twice."""
    said = [s.caption() for s in sprites.scenes("train", rows, seed())]
    said = [said[i // 2] if i % 4 == 1 else c for i, c in enumerate(said)]
    pixels, labels = torch.rand(rows, 3, 16, 16, generator=rng()), torch.randint(0, 5, (rows,), generator=rng())
    return Images(pixels, torch.randint(0, 1 << 20, (rows,), generator=rng()), labels, said)


BATCHES = {"Tokens": tokens, "Pairs": pairs, "Rollout": rollout, "Steps": steps, "Images": images}


def views(it: Live, micro: int = 8) -> Views:
    return Views(it, WORLD, micro, 0)


def player(it: Live, objective: Any, regularizers: Any = (), micro: int = 8, optimizer: Any = "optim.sgd") -> Player:
    opt = parts.build(optimizer)
    stepper = opt.build(list(it.params.values()), None)
    return Player("policy", it, opt, stepper, dict.fromkeys(objective.batch, objective), list(regularizers), views(it, micro))


def gradients(it: Live, objective: Any, batch: Any, micro: int, regularizers: Any = ()) -> tuple[dict[str, Tensor], Any]:
    """(gradient of every trained tensor, what was accumulated) of one whole batch, split in micro-batches."""
    for p in it.params.values():
        p.tensor.grad = None
    who = player(it, objective, regularizers, micro)
    got = run_batch(who, objective, batch, Progress(0, 1), micro)
    zero = lambda p: torch.zeros_like(p.tensor)
    return {n: p.tensor.grad.clone() if p.tensor.grad is not None else zero(p) for n, p in it.params.items()}, got


def at_work(regularizer: Any, it: Live, *batches: Any) -> Any:
    """What the loop asks: the part itself, or what it builds, having seen these batches."""
    if not hasattr(regularizer, "build"):
        return regularizer
    ctx = context(it.base)
    ctx.prepared = regularizer.prepare(it.base, ctx, batches) if hasattr(regularizer, "prepare") else {}
    return regularizer.build(it.base, ctx)


def plain_logp(model: torch.nn.Module, t: Tokens) -> Tensor:
    """(rows, T, V) log-probabilities of what predicts each token, from the model's own logits, row by row, document by
    document."""
    out = torch.zeros(*t.ids.shape, VOCAB)
    for i in range(len(t)):
        for s in range(int(t.segments[i].max()) + 1):
            at = (t.segments[i] == s).nonzero()[:, 0]
            logits = model(input_ids=t.ids[i, at][None]).logits[0]
            out = out.index_put((torch.tensor(i), at[1:]), logits[:-1].log_softmax(-1))
    return out


def plain_label(model: torch.nn.Module, t: Tokens) -> Tensor:
    return plain_logp(model, t).gather(-1, t.ids[..., None])[..., 0]


def write_rows(path: Path, rows: list[dict]) -> str:
    import json

    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)
