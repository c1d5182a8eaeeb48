from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from temperament.engine import see
from temperament.errors import UserError
from temperament.nn import draws
from temperament.nn.batch import Images
from temperament.parts import part
from temperament.protocols import Term, Terms


@part("objectives.contrastive.clip", modalities=("image",))
@dataclass(frozen=True)
class Clip:
    """Symmetric InfoNCE: of all captions of a batch each picture shall find its own, and of all pictures each caption.

        z_ij = s <u_i, v_j>;      loss = 1/2 CE(z_i., y_i.) + 1/2 CE(z_.i, y_.i)                      mean over pictures i

    u, v: unit features of pictures and captions; s = exp(logit scale), learned; y_i. is even over the captions equal to the
    i-th, which are as right as its own. The loss is coupled: two passes, exact under any split into micro-batches.
    Source: Radford et al. 2021.
    """

    batch: ClassVar = ("Images",)

    def counts(self, whole: Images) -> dict[str, float]:
        if not whole.captions or not all(whole.captions):
            mend = "its pictures have no captions; use a source of captions, e.g. data.sprites"
            raise UserError("train.source", "Images", mend)
        return {"clip": float(len(whole)), "found": float(len(whole))}

    def statistics(self, micro: Images, views: Any) -> Tensor:
        """(rows, 2 width + 2): u, v, the scale, and a number that stands for the caption (below 2^24: exact in fp32)."""
        base, model = views.live.base, views.model
        u = see.image_features(model, base, micro.pixels).float()
        v = see.text_features(model, base, micro.captions).float()
        scale = see.scale(model).float().expand(len(u), 1)
        who = torch.tensor([[draws.key(0, c) % (1 << 24)] for c in micro.captions], dtype=u.dtype, device=u.device)
        return torch.cat([u, v, scale, who], 1)

    def couple(self, rows: Tensor) -> Terms:
        width, n = (rows.shape[1] - 2) // 2, len(rows)
        u, v, scale, who = rows[:, :width], rows[:, width : 2 * width], rows[:, -2].mean(), rows[:, -1].detach()
        z = scale * u @ v.T
        same = who[:, None] == who[None]
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(z, target, reduction="sum") + F.cross_entropy(z.T, target, reduction="sum")) / 2
        found = same.gather(1, z.detach().argmax(1, keepdim=True)).float()
        return {"clip": Term(loss, n), "found": Term(found, n, weight=0)}
