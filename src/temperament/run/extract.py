"""`temper extract`: from two checkpoints a small change, to a stated size or a stated error.

    low_rank    LoRA that PEFT loads: the closest of a rank, or the smallest within a relative error, for each matrix
    sparse      the largest entries, as index and value
    ternary     signs and one number a tensor, Rice-coded (ComPEFT's form, of the whole change); the size is the mean of what is
                kept

Errors are relative and in Frobenius norm: |kept - change| / |change|, for each tensor and over all. One tensor is held at a
time. What was written is read again: its errors against those asked for, and, in a fresh process (by PEFT where it is
installed), its outputs against those of the base with the change (certificate.json).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from temperament.bases.load import Base, load
from temperament.bases.probe import Answer, question
from temperament.delta import Change, Delta, Dense, LowRank, Replace, Rice, Sparse, between, identity
from temperament.delta.certificate import certify
from temperament.delta.lowrank import truncated
from temperament.delta.peft_format import is_peft, read_peft
from temperament.delta.stream import finite
from temperament.errors import UserError, WorkFailed, nearest
from temperament.run.export import free
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
    certificate: bool = True,
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
    free(out, "--out")
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
        difference = _difference(lazy.changes, under, over, name)
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
    live = _live(under, delta) if certificate or kind == "low_rank" else None
    as_ = _write(delta, under, over, live, Path(out), kind)
    dense = sum(under.source.entry(n).numel * 4 for n in changes)
    whole = (left / squares) ** 0.5 if squares else 0.0
    told = {"out": str(out), "kind": kind, "as": as_, "base": base, "tuned": tuned, "error": whole, "bytes": delta.bytes,
            "times_smaller": dense / max(delta.bytes, 1), "tensors": rows}  # fmt: skip
    if not certificate:
        return told
    found = _certified(Path(out), under, over, lazy.changes, delta, live, {"stated": error, "whole": whole, "rows": rows})
    return told | {"certificate": found}


def _same(under: Input, over: Input, name: str) -> bool:
    return torch.equal(under.source.read(name), over.source.read(name).to(under.source.entry(name).dtype))


def _difference(changes: Any, under: Input, over: Input, name: str) -> Tensor:
    if not finite(under.source.read(name)):
        raise _not_finite(under, name)
    if name in over.source and not finite(over.source.read(name)):
        raise _not_finite(over, name)
    change = changes[name]
    found = change.delta(under.source.read(name) if change.needs_weight else None)
    if not finite(found):
        raise _not_finite(over, name)
    return found


def _not_finite(of: Input, name: str) -> UserError:
    file = of.source.entry(name).file if name in of.source else None
    mend = "it holds NaN or infinities: the file is damaged or its training diverged; use another"
    return UserError(f"{file or of.spec}, tensor", name.split("/", 1)[1], mend)


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


def _write(delta: Delta, under: Input, over: Input, live: Base | None, out: Path, kind: str) -> str:
    from temperament.delta.peft_write import task_type, write_peft

    if kind != "low_rank":
        delta.save(out)
        return "delta"

    def whole(name: str, change: Change) -> Change:
        if not isinstance(change, Dense):
            return change
        at, to = under.source.read(name), over.source.entry(name).dtype if name in over.source else torch.float32
        return Replace(change.apply(at.float()).to(torch.promote_types(at.dtype, to)))

    made = replace(delta, changes={n: whole(n, c) for n, c in delta.changes.items()})
    task = task_type(under.config.get("architectures") or (), bool(under.config.get("is_encoder_decoder")))
    # the model knows what it ties; a folder alone may store a tied tensor once
    write_peft(made, out, base=under.source if live is None else live.model, base_model=under.spec, task_type=task)
    return "peft"


# ---- the certificate -----------------------------------------------------------------------------------------------


def _live(under: Input, delta: Delta) -> Base | None:
    """The base as a model that can be asked; None where it is weights alone, or a model that calls them otherwise."""
    if not (under.folder / "config.json").is_file() or ("+" in under.spec and not Path(under.spec).exists()):
        return None
    base = load(under.spec, field="--base", own=True)
    try:
        question(base)
    except UserError:  # nothing is known to ask of a base of this kind
        return None
    return base if {name for name, _ in base.parameters()}.issuperset(_on(base, delta).changes) else None


def _on(base: Base, delta: Delta) -> Delta:
    """The change by the names of the base's model."""
    component = next(iter(base.components))
    return delta.remap(lambda name: f"{component}/{name.split('/', 1)[1]}")


def _certified(
    out: Path, under: Input, over: Input, changes: Any, delta: Delta, live: Base | None, asked: dict[str, Any]
) -> dict[str, Any]:
    """What is on disk: its errors again, and its outputs in a fresh process against those of the base with the change."""
    kept = read_peft(out, component="lm") if is_peft(out) else Delta.load(out)
    failures, squares, left, largest = [], 0.0, 0.0, 0.0
    for row in asked["rows"]:
        name = f"lm/{row['name']}"
        weight, difference = under.source.read(name).float(), _difference(changes, under, over, name).double()
        written = kept.change(name) if name in kept.changes else Dense(torch.zeros_like(weight))
        got = (written.apply(weight).double() - weight.double()) if written.needs_weight else written.delta().double()
        norm, off = row["norm"], float((got.view(difference.shape) - difference).norm())
        squares, left, largest = squares + norm**2, left + off**2, max(largest, off / norm)
    whole = (left / squares) ** 0.5
    near = abs(whole - asked["whole"]) <= 1e-3 * whole + 1e-4
    if not near or (asked["stated"] or 1) * 1.001 + 1e-4 < largest:
        failures.append("errors")
    found: dict[str, Any] = {"passed": True, "failures": [], "max_difference": None, "by": None}  # None: no outputs to compare
    if live is not None:
        live.apply(_on(live, delta))
        try:
            inputs = question(live)
            with torch.no_grad():
                expected = Answer(live)(**inputs)
        finally:
            live.reset()
        found = certify(out, inputs, expected, base=live.id, reload=f"{__name__}:reloaded", trust=live.trusted)
        found["by"] = "peft" if is_peft(out) and _has_peft() else "temperament"
    failures = [*failures, *found["failures"]]
    found |= {"passed": not failures, "failures": failures}
    found |= {"error": {"stated": asked["stated"], "whole": whole, "largest": largest}}
    (out / "certificate.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    if failures:
        why = ", ".join(failures)
        raise WorkFailed(f"{out} was written, but loaded again it differs from what was extracted ({why}); do not use it.")
    return found


def reloaded(base: str, folder: Path, trust: bool = False) -> tuple[nn.Module, dict[str, str]]:
    """In the fresh process: the base by its name with what is in the folder on it, by PEFT where it can."""
    found = load(base, own=True, trust_remote_code=trust)
    component = next(iter(found.components))
    if not is_peft(folder) or not _has_peft():
        found.apply(_on(found, Delta.load(folder)))
    else:
        from peft import PeftModel

        found.components[component] = PeftModel.from_pretrained(found.model, str(folder)).eval()
    return Answer(found), found.sha256


def _has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None
