from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from temperament.engine.responses import judged, read_prompts, respond, row
from temperament.engine.tokens import Sampling
from temperament.parts import part
from temperament.protocols import Examples, Reward


@part("data.best_of_k", papers=["025"], modalities=("text",))
@dataclass(frozen=True)
class BestOfK:
    """A `build` step: of k responses of the model to each prompt, the one of highest reward (the first of equals).

    Rows are prompt, completion, reward; prompts whose best response scores below `least` are left out, with the reason. Once it
    is the offline form of RAFT, best-of-k distillation; inside `rounds`, rejection sampling again and again. Source: Dong et
    al. 2023 (paper 025).
    """

    prompts: Examples  # rows with a prompt; an answer column (or completion) for the rewards
    rewards: list[Reward]  # what scores a response
    weights: list[float] = field(default_factory=list)  # one a reward; empty: all 1
    k: int = 8  # responses to each prompt
    least: float | None = None  # reward the best one must have
    max_new: int = 64  # tokens a response may have
    temperature: float = 1.0  # of sampling

    def __post_init__(self):
        if self.k < 1:
            raise ValueError("k must be at least 1")
        if self.weights and len(self.weights) != len(self.rewards):
            raise ValueError(f"{len(self.rewards)} rewards need as many weights, got {len(self.weights)}")
        if self.k > 1 and self.temperature <= 0:
            raise ValueError("temperature must be above 0: greedy responses are all alike")

    def make(self, ctx: Any) -> Iterator[Mapping[str, Any]]:
        prompts = read_prompts(self.prompts.examples(ctx), ctx)
        ids = [p.ids for p in prompts for _ in range(self.k)]
        made = respond(ctx, ctx.base.model, ids, Sampling(self.max_new, self.temperature), 0, range(len(ids)))
        for i, prompt in enumerate(prompts):
            texts = [ctx.base.tokenizer.decode(t, skip_special_tokens=True) for t in made.ids[i * self.k : (i + 1) * self.k]]
            marks = judged(self.rewards, self.weights, prompt, texts)
            best = max(range(self.k), key=lambda j: (marks[j], -j))
            made_row = row(prompt, completion=texts[best], reward=marks[best])
            if not texts[best].strip():
                yield {**made_row, "rejected_because": "the best response is empty"}
            elif self.least is not None and marks[best] < self.least:
                yield {**made_row, "rejected_because": f"the best of {self.k} scores {marks[best]:g}, below {self.least:g}"}
            else:
                yield made_row
