from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from temperament.engine import see
from temperament.errors import UserError
from temperament.nn.batch import Batch, Images
from temperament.nn.linalg import rotation
from temperament.parts import at, number, part
from temperament.protocols import Term, Terms


@part("regularizers.dr_tune", papers=["036"], modalities=("image",))
@dataclass(frozen=True)
class DRTune:
    """DR-Tune: the head must also classify what the base makes of pictures, moved to where the trained features have gone.

        weight * mean_k  - log softmax(head(SC(p_k)))[y_k]         over a bank of K triples (d_k, p_k, y_k), once a step

    d_k, p_k: features (width,) of a picture by the model when it was met and by the version; y_k: its class. The encoder is
    not held at all: no gradient reaches it from here. The bank is first in, first out, filled with the first K pictures of
    training (both slots the version's) and moved after each step. With weight K / B (rows of a step; the default) the whole is
    the paper's one mean over batch and bank, times (B + K) / B. SC, semantic calibration, without gradient, on unit vectors:

        1. rotation     P <- R (P - mean P) + mean D,    R the rotation nearest to it: Procrustes of the centred P and D
        2. translation  P_c <- P_c + sum_k s_k D_k - mean P_c   for each class c;   s = softmax of D_k . w_c / |w_c| within it
        3. length       P <- n P / |P|,    n the mean length of the trained features of this step's pictures

    w_c: the head's weight. A bank smaller than the width leaves R free outside of what it spans. BatchNorm keeps the statistics
    the base came with, in the model and in the version, so that rows stay independent; the paper's own code lets the model's
    move. Costs a forward of the model and one of the version, without gradient. Source: Zhou et al. 2023, DR-Tune (paper 036:
    K 2048 beside batches of 64, the head's rate 33 times the encoder's).
    """

    per: ClassVar = "step"
    weight: float | None = None  # factor of the bank's mean; null: bank / rows of a step, so that an item weighs as a row
    bank: int = 256  # K: pictures whose features are kept
    calibrate: bool = True  # SC; false: the version's features as they are
    rotate_every: int = 1  # steps from one rotation to the next; the others only translate (the paper's code: 10)
    version: Literal["base", "start"] = "base"  # whose features the head must still know
    head: str | None = None  # the head that is asked; null: the newest that was added, else the base's own

    def __post_init__(self):
        if self.bank < 1 or self.rotate_every < 1:
            raise ValueError("bank and rotate_every must be at least 1")
        if number(self.weight, 0.0) < 0:
            raise ValueError("weight must not be negative")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.version,)

    @torch.no_grad()
    def prepare(self, base: Any, ctx: Any, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """The version's features of the first K labelled pictures that training will see, and their classes."""
        held, known = [], 0
        with base.at("base" if self.version == "base" else "live") as model:
            for batch in batches:
                pictures = labelled(batch)
                for some in pictures.split(ctx.micro):
                    some = some.to(ctx.world.device)
                    held.append((see.features(model, base, some.pixels).float().cpu(), some.labels.cpu()))
                known += len(pictures)
                if known >= self.bank:
                    break
        found = (torch.cat(x)[: self.bank] for x in zip(*held, strict=True))
        return dict(zip(("features", "labels"), found, strict=False))  # none where no picture came

    def build(self, base: Any, ctx: Any) -> Bank:
        bank = Bank(self, base)
        if ctx.prepared:
            bank.push(ctx.prepared["features"], ctx.prepared["features"], ctx.prepared["labels"])
        return bank


@dataclass
class Bank:
    """What remembers: tuned, kept (K, width) and labels (K,), the oldest first, alike on every process."""

    part: DRTune
    base: Any
    tuned: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    kept: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    labels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    met: tuple[Tensor, Tensor, Tensor] | None = None  # in this step; they enter the bank after it

    per: ClassVar = "step"

    def prepare(self, whole: Batch, views: Any) -> None:
        pictures = labelled(whole)
        if not len(pictures):
            return
        head = self.part.head or see.newest(views.model)
        d = views.precompute("live", pictures, lambda m, rows: see.features(m, self.base, rows.pixels, head))
        p = views.precompute(self.part.version, pictures, lambda m, rows: see.features(m, self.base, rows.pixels))
        if d.shape != p.shape:
            mend = "it reads features that the base does not have; use adapters.class_head, which reads the base's own"
            raise UserError("regularizers.dr_tune.head", head, mend)
        self.met = (d, p, pictures.labels)

    def loss(self, micro: None, views: Any) -> Terms:
        if not len(self.labels) or self.met is None:
            return {}
        part, progress, model, now = at(self.part, views.progress), views.progress, views.model, self.met[0]
        head = part.head or see.newest(model)
        w = see.directions(model, self.base, head).detach().float()
        p, labels = self.kept.to(w.device), self.labels.to(w.device)
        if part.calibrate:
            turn = progress.step % part.rotate_every == 0
            p = calibrated(p, self.tuned.to(w.device), labels, w, float(now.norm(dim=1).mean()), turn)
        logits = see.say(model, self.base, p, head).float()
        weight = part.weight if part.weight is not None else len(labels) / len(now)
        return {"dr_tune": Term(see.cost(logits, labels), len(labels), weight=weight)}

    def after_step(self, progress: Any) -> None:
        if self.met is not None:
            self.push(*self.met)
        self.met = None

    def push(self, tuned: Tensor, kept: Tensor, labels: Tensor) -> None:
        for name, new in (("tuned", tuned), ("kept", kept), ("labels", labels)):
            old = getattr(self, name)
            whole = torch.cat([old, new.detach().to(old.dtype)]) if len(old) else new.detach().clone()
            setattr(self, name, whole[-self.part.bank :])

    def state_dict(self) -> dict[str, Tensor]:
        return {"tuned": self.tuned, "kept": self.kept, "labels": self.labels} if len(self.labels) else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in state.items():
            setattr(self, name, tensor)


def labelled(batch: Batch) -> Images:
    if not isinstance(batch, Images) or batch.labels is None:
        mend = "its bank holds pictures with their class; use a source of classes, e.g. data.sprites"
        raise UserError("regularizers.dr_tune", type(batch).__name__, mend)
    known = (batch.labels >= 0).nonzero()[:, 0]
    return batch if len(known) == len(batch) else batch.select(known)


@torch.no_grad()
def calibrated(kept: Tensor, tuned: Tensor, labels: Tensor, w: Tensor, length: float, turn: bool = True) -> Tensor:
    """SC: kept, tuned (K, width) of the same pictures, labels (K,), w (classes, width) -> (K, width) of this length."""
    P, D = F.normalize(kept, dim=1), F.normalize(tuned, dim=1)
    if turn:
        about, to = P.mean(0), D.mean(0)
        P = (P - about) @ rotation(P - about, D - to).T + to
    sure = (D * F.normalize(w, dim=1)[labels]).sum(1).exp()  # cosines: no exponential runs over
    total = lambda x: torch.zeros(len(w), *x.shape[1:]).to(x).index_add_(0, labels, x)
    shift = total(sure[:, None] * D) / total(sure)[:, None].clamp(min=1e-12)
    shift = shift - total(P) / total(torch.ones_like(sure))[:, None].clamp(min=1)
    return length * F.normalize(P + shift[labels], dim=1)
