"""`temper extract`: from two checkpoints a small change, to a stated size or a stated error.

    low_rank    LoRA that PEFT loads: the closest of a rank, or the smallest within a relative error, for each matrix
    sparse      the largest entries, as index and value
    ternary     signs and one number a tensor, Rice-coded (ComPEFT's form, of the whole change); the size is the mean of what is
                kept

Errors are relative and in Frobenius norm: |kept - change| / |change|, for each tensor and over all. One tensor is held at a
time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from temperament.delta import Change, Delta, Dense, LowRank, Replace, Rice, Sparse, between, identity
from temperament.delta.lowrank import truncated
from temperament.errors import UserError, nearest
from temperament.run.merge_inputs import Input, open_input
from temperament.run.vocabulary import is_vocabulary

KINDS = ("low_rank", "sparse", "ternary")


def extract(
    base: str,
    tuned: str,
    out: str | Path,
    *,
    kind: Literal["low_rank", "sparse", "ternary"] = "low_rank",
    rank: int | None = None,
    error: float | None = None,
    density: float | None = None,
    tell: Callable[..., None] = lambda event, **data: None,
) -> dict[str, Any]:
    """Write the change from `base` to `tuned` as an adapter or delta folder; returns its error and size.

    low_rank takes rank or error; sparse and ternary take density (share of each tensor's entries) or error; ternary with
    neither keeps what comes closest. Vectors (norms, biases) are kept as they are in low_rank.
    """
    if kind not in KINDS:
        raise UserError("--kind", kind, nearest(str(kind), KINDS))
    size = rank if kind == "low_rank" else density
    if (size is not None and error is not None) or (size is None and error is None and kind != "ternary"):
        named = "rank" if kind == "low_rank" else "density"
        raise UserError(f"--{named}, --error", f"{size}, {error}", f"give one of {named} and error")
    if error is not None and not 0 < error < 1:
        raise UserError("--error", error, "it is relative and lies between 0 and 1")
    if (rank is not None and rank < 1) or (density is not None and not 0 < density <= 1):
        raise UserError("--rank, --density", size, "rank is at least 1, density in (0, 1]")
    under, over = open_input(base, field="--base"), open_input(tuned)
    lazy = between(under.source, over.source, exact=False, lazy=True, identify=False)
    if lost := sorted([*lazy.additions, *(n for n in lazy.buffers if not _same(under, over, n))]):
        mend = f"{tuned} has it other than {base}, and an extract holds changes of weights alone; use `temper merge` or a copy"
        raise UserError("tensor", lost[0].split("/", 1)[1], mend)
    make = {"low_rank": lambda d: _low(d, rank, error), "sparse": lambda d: _sparse(d, density, error),
            "ternary": lambda d: _ternary(d, density, error)}[kind]  # fmt: skip
    changes: dict[str, Change] = {}
    squares, left, rows = 0.0, 0.0, []
    for k, name in enumerate(sorted(lazy.changes)):
        difference = _difference(lazy.changes[name], under, name)
        norm = float(difference.double().norm())
        if norm == 0:
            continue
        changes[name] = change = make(difference)
        if isinstance(change, LowRank) and is_vocabulary(name) and not name.endswith("lm_head.weight"):
            # an embedding is looked up, not multiplied: adapters hold its factors the other way round
            changes[name] = change = LowRank(change.B.T.contiguous(), change.A.T.contiguous(), "embedding", scale=change.scale)
        off = float((change.delta().double().view(difference.shape) - difference.double()).norm())
        squares, left = squares + norm**2, left + off**2
        row = {"name": name.split("/", 1)[1], "error": off / norm, "bytes": change.bytes, "norm": norm}
        rows.append(row | ({"rank": change.rank} if hasattr(change, "rank") else {}))
        tell("extract", done=k + 1, total=len(lazy.changes), **row)
    if not changes:
        raise UserError("tuned", tuned, f"its weights are those of {base}: there is nothing to extract")
    delta = Delta(changes, base=identity(under.source), meta={"extracted": {"kind": kind, "from": tuned, "base": base}})
    as_ = _write(delta, under, Path(out), kind)
    dense = sum(under.source.entry(n).numel * 4 for n in changes)
    whole = (left / squares) ** 0.5 if squares else 0.0
    return {"out": str(out), "kind": kind, "as": as_, "base": base, "tuned": tuned, "error": whole, "bytes": delta.bytes,
            "times_smaller": dense / max(delta.bytes, 1), "tensors": rows}  # fmt: skip


def _same(under: Input, over: Input, name: str) -> bool:
    return torch.equal(under.source.read(name), over.source.read(name).to(under.source.entry(name).dtype))


def _difference(change: Change, under: Input, name: str) -> Tensor:
    return change.delta(under.source.read(name) if change.needs_weight else None)


def _low(d: Tensor, rank: int | None, error: float | None) -> Change:
    if d.dim() < 2:
        return Dense(d)
    full = min(d.shape[0], d[0].numel())
    low = truncated(d, min(rank, full) if rank else None, error)
    return low if low.parameters < d.numel() else Dense(d)


def _order(d: Tensor) -> tuple[Tensor, Tensor]:
    """|d| from the largest down, and its places."""
    flat = d.reshape(-1).abs().double()
    return flat.sort(descending=True)


def _sparse(d: Tensor, density: float | None, error: float | None) -> Change:
    values, at = _order(d)
    if density is not None:
        count = max(1, int(density * d.numel()))
    else:
        left = values.square().flip(0).cumsum(0).flip(0)  # left[k]: squared error of keeping k
        count = max(1, int((left > (error**2) * left[0]).sum()))
    kept = torch.zeros(d.numel(), dtype=d.dtype)
    kept[at[:count]] = d.reshape(-1)[at[:count]]
    return Sparse.of(kept.view(d.shape))


def _ternary(d: Tensor, density: float | None, error: float | None) -> Change:
    """Keeping k entries at their mean size a: |d|^2 - k a^2 is left, so k a^2 is what is explained."""
    values, at = _order(d)
    sums, counts = values.cumsum(0), torch.arange(1, d.numel() + 1, dtype=torch.float64)
    explained = sums.square() / counts
    if density is not None:
        count = max(1, int(density * d.numel()))
    elif error is not None:
        enough = explained >= (1 - error**2) * values.square().sum()
        if not bool(enough.any()):
            best = float((1 - explained.max() / values.square().sum()).clamp_min(0).sqrt())
            raise UserError(
                "--error",
                error,
                f"signs of one size come no closer than {best:.2f} to one of these tensors; use low_rank or sparse",
            )
        count = int(enough.nonzero()[0]) + 1
    else:
        count = int(explained.argmax()) + 1
    kept = torch.zeros(d.numel(), dtype=d.dtype)
    kept[at[:count]] = d.reshape(-1)[at[:count]].sign()
    return Rice.pack(kept.view(d.shape), float(sums[count - 1] / count))


def _write(delta: Delta, under: Input, out: Path, kind: str) -> str:
    from temperament.delta.peft_write import task_type, write_peft

    if kind != "low_rank":
        delta.save(out)
        return "delta"
    whole = {n: Replace(c.apply(under.source.read(n))) if isinstance(c, Dense) else c for n, c in delta.changes.items()}
    task = task_type(under.config.get("architectures") or (), bool(under.config.get("is_encoder_decoder")))
    write_peft(replace(delta, changes=whole), out, base=under.source, base_model=under.spec, task_type=task)
    return "peft"
