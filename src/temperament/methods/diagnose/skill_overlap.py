from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from temperament.delta import Delta
from temperament.errors import UserError
from temperament.nn import linalg
from temperament.parts import part


@dataclass(frozen=True)
class Region:
    """Entries by tensor that carry a skill."""

    at: dict[str, Tensor]

    @property
    def size(self) -> int:
        return sum(len(i) for i in self.at.values())

    def shared(self, other: Region) -> int:
        return sum(int(torch.isin(i, other.at[n]).sum()) for n, i in self.at.items() if n in other.at)


@part("diagnose.skill_overlap", papers=["061"])
@dataclass(frozen=True)
class SkillOverlap:
    """How much of the region that carries one skill carries another too: o(i, j) = |m_i and m_j| / |m_i|.

        m_i    the entries a graft keeps (a sparse change); of any other change the `share` of all entries that changed most
        chance |m_j| / (entries of all tensors): what two regions with nothing to do with each other would share

    Near chance: the skills can be added; far above: they were learned in one place, and merging them interferes. Source:
    Panigrahi et al. 2023, Task-Specific Skill Localization (paper 061).
    """

    others: list[str] = field(default_factory=list)  # folders of changes it is compared with: delta/ of runs, grafts
    share: float = 0.01  # of all entries, where a change is not sparse

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"share lies in (0, 1], not {self.share}")

    @torch.no_grad()
    def diagnose(self, subject: Any) -> dict[str, Any]:
        if not self.others:
            raise UserError("diagnose.skill_overlap.others", self.others, "name the changes it is compared with")
        changes = {"this": subject.delta} | {name: Delta.load(name) for name in self.others}
        for delta in list(changes.values())[1:]:
            delta.check_base(subject.base.sha256)
        known = dict(subject.base.parameters())
        weights = {n: subject.base.originals.get(n, p.detach()).cpu() for n, p in known.items()}
        total = sum(weights[n].numel() for n in {n for d in changes.values() for n in d.changes})
        regions = {name: region(delta, weights, self.share) for name, delta in changes.items()}
        rows = [{"skill": a, "with": b, "overlap": regions[a].shared(regions[b]) / max(regions[a].size, 1),
                 "chance": regions[b].size / total} for a in regions for b in regions if a != b]  # fmt: skip
        return {"entries": {name: r.size for name, r in regions.items()}, "rows": rows}


def region(delta: Delta, weights: dict[str, Tensor], share: float) -> Region:
    """A sparse change's entries; else the share of all entries of its tensors that changed most."""
    moved = {n: delta.change(n).delta(weights[n]).reshape(-1).abs().float() for n in sorted(delta.changes)}
    sparse = 2 * sum(int(m.count_nonzero()) for m in moved.values()) < sum(m.numel() for m in moved.values())
    if sparse:
        return Region({n: m.nonzero()[:, 0] for n, m in moved.items()})
    return Region(linalg.largest_of_all(moved, max(1, int(share * sum(m.numel() for m in moved.values()) + 0.5))))
