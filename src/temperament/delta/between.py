"""The delta between two checkpoints of one architecture: paths, modules or dicts of tensors, streamed tensor by tensor."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from temperament.delta.change import Change, Dense, Sparse, wide
from temperament.delta.delta import Addition, Delta, Lazy
from temperament.delta.hash import identity
from temperament.delta.on_weight import Replace
from temperament.delta.peft_format import is_peft, read_peft
from temperament.delta.stream import Source, finite, open_source
from temperament.errors import UserError

SPARSE_BELOW = 0.25  # share of changed entries under which a sparse difference is smaller by half or more


def between(base, tuned, exact: bool = True, lazy: bool = False, component: str = "lm", identify: bool = True) -> Delta:
    """tuned - base.

    exact: base + delta is tuned bit for bit (differences that would round are kept as the tuned values); otherwise plain fp32
        differences, sparse where few entries changed.
    lazy: nothing is read but the headers; each change is made when asked for, and unchanged tensors are then among the names.
        What a merge of models larger than memory uses.
    identify: record the sha256 of the base's components (one more pass over the base).

    Tied tensors are one, also where one side stores them twice. A tensor that only `tuned` has becomes an addition. One that
    only `base` has, another shape or dtype, a NaN or an infinity is a UserError.
    """
    base, tuned = open_source(base, component), open_source(tuned, component)
    pairs, new = _pair(base, tuned)
    for name, other in pairs.items():
        _compatible(name, base, tuned, other, exact)

    def make(name: str, skip_equal: bool = False) -> Change | None:
        value = tuned.read(pairs[name])
        if not finite(value):
            mend = f"{tuned.label} is damaged or its training diverged; use another"
            raise UserError(f"values of {name}", "not all finite", mend)
        if lazy and exact:
            return Replace(value)
        return _change(base.read(name), value, exact, skip_equal)

    buffers = [name for name in pairs if base.is_buffer(name) or tuned.is_buffer(pairs[name])]
    trained = [name for name in pairs if name not in set(buffers)]
    if lazy:
        changes, statistics = Lazy(trained, make), Lazy(buffers, make)
    else:
        changes, statistics = ({n: c for n in names if (c := make(n, True)) is not None} for names in (trained, buffers))
    additions = {name: Addition("", {}, {"value": tuned.read(name)}) for name in new}
    return Delta(changes, additions, statistics, identity(base) if identify else {})


def as_delta(what, base, component: str = "lm", lazy: bool = True) -> Delta:
    """Whatever a user points at, as a delta on `base`: a Delta, a saved one, a PEFT adapter, a tuned model (path, module)."""
    if isinstance(what, Delta):
        return what
    folder = Path(what) if isinstance(what, str | os.PathLike) else None
    if folder is not None and is_peft(folder):
        return read_peft(folder, base)
    if folder is not None and (folder / "delta.json").is_file():
        return Delta.load(folder, lazy=lazy)
    return between(base, what, lazy=lazy, component=component)


def _pair(base: Source, tuned: Source) -> tuple[dict[str, str], list[str]]:
    """({base name: tuned name}, names only tuned has). A tied tensor may go by either of its names on either side."""
    pairs, used = {}, set()
    for name in base.names:
        known = [name, *(alias for alias, kept in base.aliases.items() if kept == name)]
        other = next((tuned.aliases.get(n, n) for n in known if n in tuned), None)
        if other is None:
            other = _twin(base, name, tuned)
        pairs[name] = other
        used.add(other)
    new = []
    for name in tuned.names:
        kept = base.aliases.get(name)
        if name in used:
            continue
        if kept is None:
            new.append(name)
        elif not same_bits(tuned.read(name), tuned.read(pairs[kept])):
            mend = f"it is one tensor with {kept!r} in the base, but two in {tuned.label}; untie the base first"
            raise UserError("tied tensors", name, mend)
    return pairs, new


def _twin(base: Source, name: str, tuned: Source) -> str:
    """The tuned name of a base tensor that tuned does not store: the base stored a tied tensor twice, so its equal's name."""
    entry = base.entry(name)
    for other in base.names:
        twin = base.entry(other)
        alike = other != name and other in tuned and (twin.shape, twin.dtype) == (entry.shape, entry.dtype)
        if alike and len(entry.shape) > 1 and same_bits(base.read(other), base.read(name)):
            return tuned.aliases.get(other, other)
    raise UserError("tensor", name, f"{base.label} has it and {tuned.label} has not; both must be of one architecture")


def _compatible(name: str, base: Source, tuned: Source, other: str, exact: bool) -> None:
    a, b = base.entry(name), tuned.entry(other)
    if a.shape != b.shape:
        rows = " (another vocabulary?)" if a.shape[1:] == b.shape[1:] and len(a.shape) == 2 else ""
        mend = f"the base has {list(a.shape)}{rows}; use a tuned model of this base"
        raise UserError(f"shape of {name}", list(b.shape), mend)
    if exact and a.dtype != b.dtype and torch.promote_types(a.dtype, b.dtype) != a.dtype:
        mend = f"the base's {a.dtype} cannot hold it exactly; convert one or pass exact=False"
        raise UserError(f"dtype of {name}", str(b.dtype), mend)


def _change(weight: Tensor, value: Tensor, exact: bool, skip_equal: bool) -> Change | None:
    """The smallest expression for value - weight; exact: one whose application gives the bits of `value`."""
    if skip_equal and same_bits(weight, value):
        return None
    if not weight.dtype.is_floating_point:
        return Replace(value)
    changed = bits(weight) != bits(value.to(weight.dtype))
    if int(changed.count_nonzero()) < SPARSE_BELOW * value.numel():
        at = changed.nonzero().squeeze(1)
        old, new = weight.reshape(-1)[at], value.reshape(-1)[at]
        at = at.to(torch.int32 if value.numel() < 2**31 else torch.int64)
        adds = not exact or _adds(old, new)
        return Sparse(at, wide(new) - wide(old) if adds else new, tuple(value.shape), new=not adds)
    return Dense(wide(value) - wide(weight)) if not exact or _adds(weight, value) else Replace(value)


def _adds(weight: Tensor, value: Tensor) -> bool:
    """weight + (value - weight) gives the bits of value. A short piece is tried first: it nearly always tells."""
    weight, value = weight.reshape(-1), value.reshape(-1)
    pieces = [(weight[:4096], value[:4096]), (weight, value)]
    return all(same_bits((wide(w) + (wide(v) - wide(w))).to(w.dtype), v) for w, v in pieces)


def bits(tensor: Tensor) -> Tensor:
    """The flat tensor as integers, so that -0.0 is not 0.0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.reshape(-1).view(integers[tensor.dtype.itemsize])


def same_bits(x: Tensor, y: Tensor) -> bool:
    """y, in the dtype of x, is x."""
    return torch.equal(bits(x), bits(y.to(x.dtype)))


