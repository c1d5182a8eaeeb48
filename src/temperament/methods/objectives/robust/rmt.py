from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from temperament.engine import see
from temperament.engine.augment import looked
from temperament.nn.batch import Images
from temperament.parts import number, part
from temperament.protocols import Term, Terms


@part("objectives.robust.rmt", papers=["200"], modalities=("image",), declares=["adapts at test time"])
@dataclass(frozen=True)
class RMT:
    """Robust mean teacher: learn from unlabelled pictures of a domain that moves, held by a mean of oneself and the source.

        self      1/2 S(f(x), f_ema(x)) + 1/2 S(f(x'), f_ema(x));   S(p, q) = - <q, log p> - reverse <p, log q>
        contrast  - mean_{j in P(i)} log( exp(z_i.z_j / T) / sum_{k != i} exp(z_i.z_k / T) )     mean over the 3 rows anchors i
        replay    - log p(label)                                                        of the rows that bring a label

    x' is another look at x (engine/augment.py); p, q: softmax, nats; f_ema: the version `ema`, without gradient; its running
    mean is the step's `ema`. z: the projection, on the unit sphere, of three views of a row - the features of x and of x', and
    the source's prototype nearest to the first - each positive to the other two (P), all other rows' negative. S is bounded
    and even where the student is sure and wrong; reverse 0 is the plain mean teacher. The loss is coupled: exact under any
    split, but where the base's BatchNorm reads batches (adapters.batch_statistics). Source: Doebler, Marsden, Yang 2023.
    """

    batch: ClassVar = ("Images",)
    self_training: float = 1.0  # weight of the first term; may be a schedule
    contrast: float = 1.0  # weight of the second; above 0 it wants adapters.projection_head with prototypes
    replay: float = 1.0  # weight of the third, where the source replays labelled pictures
    reverse: float = 1.0  # of S: what the reverse cross-entropy counts against the forward one
    temperature: float = 0.1  # T
    look: float = 1.0  # how far x' is from x; 0: not at all
    head: str | None = None  # the head that is asked; null: the newest that was added, else the base's own
    projection: str = "projection"  # name of the projection head

    needs: ClassVar = ("ema",)

    def __post_init__(self):
        if number(self.temperature, 1.0) <= 0:
            raise ValueError("temperature must be above 0")
        weights = (self.self_training, self.contrast, self.replay, self.reverse, self.look)
        if min(number(w, 0.0) for w in weights) < 0:
            raise ValueError("weights must not be negative")

    @property
    def contrasts(self) -> bool:
        return number(self.contrast, 1.0) != 0

    def counts(self, whole: Images) -> dict[str, float]:
        n = float((_labels(whole) < 0).sum())
        own = {"self": n} | ({"contrast": 3 * n} if self.contrasts else {})
        return own | ({"replay": len(whole) - n} if n < len(whole) else {})

    def statistics(self, micro: Images, views: Any) -> Tensor:
        """(rows, 3 classes + 3 width + 2): logits of x, x' and of the teacher, three projections, the label, the classes."""
        base, model, labels = views.live.base, views.model, _labels(micro)
        head = self.head or see.newest(model)
        said, h = see.both(model, base, micro.pixels, head)
        again, h_again, taught = said, h, said
        if (labels < 0).any():  # (rows that bring a label need no second look)
            other = looked(micro.pixels, micro.examples, views.seed, "rmt", self.look)
            again, h_again = see.both(model, base, other, head)
            with torch.no_grad():
                taught = see.logits(views.view("ema"), base, micro.pixels, head)
        z = []
        if self.contrasts:
            project = views.head(self.projection)
            z = [project(v.float()) for v in (project.nearest(h.float()), h, h_again)]
        classes = torch.full_like(said[:, :1], said.shape[1])
        return torch.cat([said, again, taught.detach(), *z, labels[:, None].to(said), classes], 1).float()

    def couple(self, rows: Tensor) -> Terms:
        labels, classes, terms = rows[:, -2].detach().long(), int(rows[0, -1]), {}
        new, known = rows[labels < 0], rows[labels >= 0]
        if len(new):
            u, again, v = new[:, : 3 * classes].view(len(new), 3, classes).unbind(1)
            each = (symmetric(u, v.detach(), self.reverse) + symmetric(again, v.detach(), self.reverse)) / 2
            terms["self"] = Term(each, len(new), self.self_training)
            if self.contrasts:
                z = new[:, 3 * classes : -2].view(len(new), 3, -1)
                terms["contrast"] = Term(contrast(z, self.temperature), 3 * len(new), self.contrast)
        if len(known):
            terms["replay"] = Term(see.cost(known[:, :classes], labels[labels >= 0]), len(known), self.replay)
        return terms


def _labels(rows: Images) -> Tensor:
    return rows.labels if rows.labels is not None else torch.full((len(rows),), -1, device=rows.pixels.device)


def symmetric(u: Tensor, v: Tensor, reverse: float = 1.0) -> Tensor:
    """(rows,): - <softmax v, log softmax u> - reverse <softmax u, log softmax v>, nats."""
    p, q = u.log_softmax(-1), v.log_softmax(-1)
    return -(q.exp() * p).sum(-1) - reverse * (p.exp() * q).sum(-1)


def contrast(z: Tensor, temperature: float) -> Tensor:
    """(rows * views,) of z (rows, views, width) on the unit sphere: how hard the other views of a row are to find among all."""
    rows, views, _ = z.shape
    flat, who = z.flatten(0, 1), torch.arange(rows, device=z.device).repeat_interleave(views)
    same = who[:, None] == who[None]
    own = torch.eye(len(flat), dtype=torch.bool, device=z.device)
    logp = (flat @ flat.T / temperature).masked_fill(own, -torch.inf).log_softmax(1)
    return -logp.masked_fill(own | ~same, 0.0).sum(1) / (views - 1)
