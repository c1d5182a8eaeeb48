"""Calling a model on pictures: what it calls them, and what it makes of them before it names anything.

    logits(model, base, pixels)                 (rows, classes) of the base's own head
    logits(model, base, pixels, head="digits")  of a head that was added to it (nn/classes.py)
    features(model, base, pixels)               (rows, width) pooled: what heads read
    both(model, base, pixels)                   the two, of one forward
    say(model, base, features)                  (rows, classes) what a head makes of features; `directions`: its weight
    image_features, text_features               (rows, width) on the unit sphere, of a dual encoder (CLIP)
    fits(model, base, pixels, captions)         (rows, k): the logit of each of a picture's k captions
    cost(logits, labels)                        (rows,) cross-entropy of each picture's class
    counted(rows), named(logits, labels)        the counts and the terms of an objective on classes

pixels (rows, 3, H, W) in 0..1. `model` is a module or a view of one; ViTs, residual networks and CLIP are called alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temperament.engine.pictures import normalised
from temperament.errors import UserError, nearest
from temperament.nn import forward
from temperament.nn.batch import Images
from temperament.nn.classes import ClassHead, heads
from temperament.nn.context import context
from temperament.nn.forward import Model
from temperament.protocols import Term, Terms


def dual(base: Any) -> bool:
    """Has it an image encoder and a text encoder in one space?"""
    return all(hasattr(base.model, f"get_{side}_features") for side in ("image", "text"))


def own_classes(base: Any) -> list[str]:
    """What the base's own head tells apart, in its order; none where it has no such head."""
    if _classifier(base.model) is None:
        return []
    named = base.model.config.id2label
    return [str(named[i]) for i in sorted(named)]


def head_for(model: Model, base: Any, classes: Sequence[str]) -> str | None:
    """The head that tells exactly these classes apart: the name of the newest one added, "" for the base's own, None."""
    found = [name for name, head in heads(model).items() if list(head.classes) == list(classes)]
    return found[-1] if found else "" if own_classes(base) == list(classes) else None


def _classifier(module: nn.Module) -> nn.Module | None:
    """Where a classifier of pictures keeps its head: what it is given are the pooled features."""
    found = getattr(module, "classifier", None)
    return found if isinstance(found, nn.Module) and getattr(module, "main_input_name", "") == "pixel_values" else None


def _said(model: Model, base: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
    """(logits of the base's own head, pooled features)."""
    module = forward.module_of(model)
    if dual(base):
        return None, image_features(model, base, pixels, unit=False)
    classifier = _classifier(module)
    if classifier is None:
        raise UserError("base", base.id, "it does not classify pictures; use an image base, e.g. lab/vit, lab/cnn or lab/clip")
    kept: list[Tensor] = []
    with forward.active(model):
        hook = classifier.register_forward_pre_hook(lambda m, args: kept.append(args[0]), prepend=True)
        try:
            out = model(pixel_values=normalised(base, pixels))
        finally:
            hook.remove()
    return out.logits, kept[0].flatten(1)


def names_pictures(base: Any) -> bool:
    return dual(base) or _classifier(base.model) is not None


def said(model: Model, base: Any, rows: Images) -> Tensor:
    """All that a model makes of pictures, side by side: its own logits and the pooled features, or those of both encoders."""
    own, pooled = _said(model, base, rows.pixels)
    more = text_features(model, base, rows.captions) if own is None and rows.captions else own
    return pooled if more is None else torch.cat([more, pooled], 1)


def features(model: Model, base: Any, pixels: Tensor, head: str | None = None) -> Tensor:
    """What the head reads: the pooled features, unless it computes others of its own."""
    with forward.active(model), context():
        pooled = _said(model, base, pixels)[1]
        return _added(model, head).reads(pooled) if head else pooled


def logits(model: Model, base: Any, pixels: Tensor, head: str | None = None) -> Tensor:
    return both(model, base, pixels, head)[0]


def both(model: Model, base: Any, pixels: Tensor, head: str | None = None) -> tuple[Tensor, Tensor]:
    """(logits, features)."""
    with forward.active(model), context():
        own, pooled = _said(model, base, pixels)
        if head:
            added = _added(model, head)
            features = added.reads(pooled)
            return added.logits(features), features
        if own is None:
            raise UserError("head", None, _CLASSLESS.format(base.id))
        return own, pooled


def say(model: Model, base: Any, features: Tensor, head: str | None = None) -> Tensor:
    """The logits of features that are at hand."""
    with forward.active(model):
        if head:
            return _added(model, head).logits(features)
        return _own(model, base)(features)


def directions(model: Model, base: Any, head: str | None = None) -> Tensor:
    """(classes, width): the weight of a head's last map, a row for each class."""
    with forward.active(model):
        found = _added(model, head) if head else _own(model, base)
        return [m for m in found.modules() if isinstance(m, nn.Linear)][-1].weight


_CLASSLESS = "{} has no classes of its own; add adapters.class_head to the trainable"


def _own(model: Model, base: Any) -> nn.Module:
    found = None if dual(base) else _classifier(forward.module_of(model))
    if found is None:
        raise UserError("head", None, _CLASSLESS.format(base.id))
    return found


def _added(model: Model, head: str) -> ClassHead:
    known = heads(model)
    if head not in known:
        mend = f"the model has no such head; {nearest(head, known) if known else 'add adapters.class_head'}"
        raise UserError("head", head, mend)
    return known[head]


def cost(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """(rows,): the cross-entropy of each picture's class, nats; 0 where it has none."""
    if int(labels.max()) >= max(logits.shape[1], 1):  # (a plan's shapes have no numbers: there it is class 0 of none)
        mend = "give this source as `of`, of adapters.class_head or of the objective"
        mend = f"the model tells {logits.shape[1]} classes apart; {mend}"
        raise UserError("train.source", f"class {int(labels.max())}", mend)
    return F.cross_entropy(logits, labels.clamp(min=0), reduction="none", label_smoothing=smoothing) * (labels >= 0)


def counted(whole: Images) -> dict[str, float]:
    """The counts of `named`: labelled pictures. Pictures of which none can have a label are refused."""
    if whole.labels is None:
        raise UserError("train.source", "Images", "its pictures have no labels; use a source of classes, e.g. data.sprites")
    return dict.fromkeys(("cross_entropy", "accuracy"), float((whole.labels >= 0).sum()))


def named(logits: Tensor, labels: Tensor, smoothing: float = 0.0, weights: Tensor | None = None) -> Terms:
    """Two terms of logits (rows, classes): the cost of each picture's class, weighed, and whether it is told rightly, which is
    logged."""
    each, n = cost(logits, labels, smoothing), float((labels >= 0).sum())
    right = (logits.detach().argmax(-1) == labels).float()
    return {"cross_entropy": Term(each if weights is None else each * weights, n), "accuracy": Term(right, n, weight=0)}


def newest(model: Model) -> str | None:
    """The head that is trained where none is named: the newest that was added, else (None) the base's own."""
    return next(reversed(heads(model)), None)


def width(base: Any) -> int:
    """Of the pooled features."""
    if dual(base):
        return base.model.config.projection_dim
    found = [m for m in (_classifier(base.model) or nn.Identity()).modules() if isinstance(m, nn.Linear)]
    if not found:
        raise UserError("base", base.id, "it does not classify pictures; use an image base, e.g. lab/vit, lab/cnn or lab/clip")
    return found[0].in_features


# ---- pictures and words ----------------------------------------------------------------------------------------------------


def image_features(model: Model, base: Any, pixels: Tensor, unit: bool = True) -> Tensor:
    _needs_both(base)
    with forward.active(model):
        found = _pooled(forward.module_of(model).get_image_features(pixel_values=normalised(base, pixels)))
    return F.normalize(found, dim=-1) if unit else found


def text_features(model: Model, base: Any, captions: Sequence[str]) -> Tensor:
    """A caption that comes more than once is read once."""
    _needs_both(base)
    unique = list(dict.fromkeys(captions))
    longest = base.model.config.text_config.max_position_embeddings
    read = base.tokenizer(unique, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    device = forward.device_of(model)
    words = {k: read[k].to(device) for k in ("input_ids", "attention_mask")}
    with forward.active(model):
        found = F.normalize(_pooled(forward.module_of(model).get_text_features(**words)), dim=-1)
    at = {c: i for i, c in enumerate(unique)}
    return found[torch.tensor([at[c] for c in captions], device=device)]


def scale(model: Model) -> Tensor:
    """exp of the learned logit scale: what a cosine is multiplied with."""
    with forward.active(model):
        return forward.module_of(model).logit_scale.exp()


def fits(model: Model, base: Any, pixels: Tensor, captions: Sequence[Sequence[str]]) -> Tensor:
    """captions: k of each picture."""
    k = len(captions[0])
    said = text_features(model, base, [c for row in captions for c in row]).view(len(captions), k, -1)
    return scale(model) * (said @ image_features(model, base, pixels)[..., None])[..., 0]


def _pooled(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found.pooler_output


def _needs_both(base: Any) -> None:
    if not dual(base):
        mend = "it does not read pictures and captions in one space; use one that does, e.g. lab/clip"
        raise UserError("base", base.id, mend)


def must_know(ctx: Any, classes: Sequence[str], field: str) -> None:
    """Refuse labels of classes that no head of the model tells apart. (Nothing is built yet where a part only looks.)"""
    own = own_classes(ctx.base)
    if not own or ctx.live is None or not ctx.live.params or head_for(ctx.live.model, ctx.base, classes) is not None:
        return
    brief = lambda names: ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    mend = f"the base tells {brief(own)} apart; add a head, adapters.class_head with `of: {field}`, to the trainable"
    raise UserError(field, brief(list(classes)), mend)
