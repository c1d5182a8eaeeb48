from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from temperament.engine.contribution import contributions
from temperament.engine.encode import encode_all
from temperament.engine.responses import as_prompt
from temperament.engine.tokens import Sampling, generate
from temperament.errors import UserError
from temperament.nn import draws
from temperament.parts import part
from temperament.protocols import Examples


@part("diagnose.tuco", papers=["028"], modalities=("text",))
@dataclass(frozen=True)
class TuCo:
    """Tuning contribution: how much of what a model makes of a prompt comes from its tuning, in [0, 1].

        TuCo = | sum_l FTC_l | / ( | sum_l PTC_l | + | sum_l FTC_l | )        sums over blocks, at the last token of the prompt
        PTC_l: what block l adds to the stream in the base; FTC_l: what the tuned block adds beyond that, at the same input

    The input is that of the tuned model, so embeddings + all PTC + all FTC are its last state exactly (engine/contribution.py).
    0 for an untouched model. Given sets of prompts by name, their distributions are compared: `auc` is the probability that a
    prompt of the first set has the higher TuCo. Prompts that get round what was tuned score lower. Source: paper 028 (norm 1).
    """

    sets: dict[str, Examples] = field(default_factory=dict)  # prompts by name; empty: texts the base samples itself
    norm: int = 1  # 1: sum of magnitudes, 2: Euclidean
    items: int = 64  # prompts of a set at most

    def __post_init__(self):
        if self.norm not in (1, 2) or self.items < 1:
            raise ValueError("norm is 1 or 2, and items at least 1")

    @torch.no_grad()
    def diagnose(self, subject: Any) -> dict[str, Any]:
        base = subject.base
        base.reset()
        prompts = {name: self._read(name, rows, base) for name, rows in self.sets.items()} or {"own samples": self._own(base)}
        if subject.delta is not None:
            base.apply(subject.delta)
        try:
            parts = {name: contributions(base, ids) for name, ids in prompts.items()}
        finally:
            base.reset()
        values = {name: tuco(*both, norm=self.norm)[-1] for name, both in parts.items()}
        first = next(iter(values.values()))
        sets = []
        for name, v in values.items():
            low, high = v.quantile(torch.tensor([0.05, 0.95], dtype=v.dtype)).tolist()
            told = {"set": name, "prompts": len(v), "mean": float(v.mean()), "low": low, "high": high}
            sets.append(told | {"auc": auc(first, v), "values": [round(x, 6) for x in v.tolist()]})
        along = {name: tuco(*both, norm=self.norm).mean(1) for name, both in parts.items()}
        depth = len(next(iter(along.values())))
        layers = [{"layer": k, **{name: float(v[k]) for name, v in along.items()}} for k in range(depth)]
        return {"tuco": sets[0]["mean"], "norm": self.norm, "sets": sets, "layers": layers}

    def _read(self, name: str, rows: Any, base: Any) -> list[list[int]]:
        if base.tokenizer is None:
            raise UserError("diagnose.tuco.sets", name, "the base has no tokenizer to read prompts with; leave the sets out")
        found = encode_all([as_prompt(e) for e in rows.examples(None)[: self.items]], base.tokenizer)[0]
        if not found:
            raise UserError(f"diagnose.tuco.sets.{name}", 0, "it has no prompts; give at least one")
        return [p.ids for p in found]

    def _own(self, base: Any) -> list[list[int]]:
        """Texts the pure base writes, from its start token or any other."""
        start = getattr(base.tokenizer, "bos_token_id", None)
        size = base.model.config.get_text_config().vocab_size
        any_ = draws.randint(size, 0, "tuco-start", 0, torch.arange(self.items)).tolist()
        starts = [[i if start is None else start] for i in any_]
        made = generate(base.model, starts, Sampling(max_new=24, temperature=1.0))
        return [s + ids for s, ids in zip(starts, made.ids, strict=True)]


def tuco(ptc: Tensor, ftc: Tensor, norm: int = 1) -> Tensor:
    """(blocks, prompts) in [0, 1] of contributions (blocks, prompts, width): up to each block; the last is the model's."""
    before, added = (t.double().cumsum(0).norm(p=norm, dim=-1) for t in (ptc, ftc))
    return torch.where(added > 0, added / (before + added), torch.zeros_like(added))


def auc(first: Tensor, other: Tensor) -> float:
    """P(first > other), ties counted half."""
    gap = first[:, None] - other
    return float((gap > 0).double().mean() + 0.5 * (gap == 0).double().mean())
