"""Where a run stands between steps: the change from the base so far, and the address of what made it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from temperament.bases.load import Base
from temperament.delta import Change, Delta, LowRank, Replace, Sparse
from temperament.delta.combined import add


@dataclass(frozen=True)
class State:
    """delta: from the pure base to here (None: the base itself). key: what made it. folder: where it is kept. stage: how many
    steps that changed the weights lie between the base and here, on the longest way."""

    key: str
    delta: Delta | None = None
    folder: Path | None = None
    data: dict[str, str] = field(default_factory=dict)  # data sets made by build steps, by step name
    stage: int = 0


def place_on(base: Base, state: State) -> Base:
    """The base's modules as this state has them."""
    base.reset()
    if state.delta is not None:
        base.apply(state.delta)
    return base


@torch.no_grad()
def chain(base: Base, before: Delta | None, step: Delta) -> Delta:
    """The change from the pure base after a further step; the base's modules must hold the *start* of that step, or its end for
    tensors the step trained in place; changes are on the CPU, as what is read from disk is. Low-rank on low-rank stays
    low-rank, sparse on sparse sparse; where a step replaced or composed a tensor, the tensor is kept."""
    if before is None:
        return step
    before = before.baked()  # a merge may leave a strength, which holds for what this step does not touch as well
    known = dict(base.parameters())
    changes: dict[str, Change] = dict(before.changes)
    for name, change in step.changes.items():
        old = changes.get(name)
        if old is None:
            changes[name] = change
        elif isinstance(old, LowRank) and isinstance(change, LowRank):
            changes[name] = add(old, change)
        elif isinstance(change, Replace):
            changes[name] = change
        else:
            whole = change.apply(old.apply(base.originals.get(name, known[name].detach()).cpu()))
            sparse = isinstance(old, Sparse) and isinstance(change, Sparse)
            changes[name] = Sparse.at(whole, torch.cat([old.indices, change.indices]).unique()) if sparse else Replace(whole)
    additions = dict(before.additions)
    for name, addition in step.additions.items():  # two steps may add at one place: the later lies above
        additions[name if name not in additions else f"{name}+{sum(n.partition('+')[0] == name for n in additions)}"] = addition
    return Delta(changes, additions, {**before.buffers, **step.buffers}, base=before.base or step.base)
