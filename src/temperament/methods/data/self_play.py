from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from temperament.engine.responses import in_turn, read_prompts, respond, row
from temperament.engine.tokens import Sampling
from temperament.errors import UserError
from temperament.parts import part
from temperament.protocols import Examples


@part("data.self_play", papers=["069"], modalities=("text",))
@dataclass(frozen=True)
class SelfPlay:
    """A `build` step: the given answer against the model's own, y' ~ p_k(. | x): the pairs of a round of self-play (SPIN).

        loss of the round = - log sigmoid( beta ( log p/p_k (y | x)  -  log p/p_k (y' | x) ) )

    which is objectives.preference.dpo with reference start.

    p_k is the model as the round began, which is also the reference of the training that follows: at its first step the loss is
    log 2, and on average over y ~ p_k nothing is left to learn. From the second round on the pairs that were new in the round
    before are mixed in. An own answer equal to the given one has no gradient and is left out, with the reason. Rows: prompt,
    chosen, rejected, round.
    Source: Chen et al. 2024, Self-Play Fine-Tuning (paper 069).
    """

    rows: Examples  # prompts with the answers they should get
    take: int = 0  # rows of a round, in turn from round to round; 0: all, each round
    mix: bool = True  # add what was new in the round before
    max_new: int = 64  # tokens an own answer may have
    temperature: float = 1.0  # of sampling

    def make(self, ctx: Any) -> Iterator[Mapping[str, Any]]:
        prompts = read_prompts(self.rows.examples(ctx), ctx)
        for p in prompts:
            if "answer" not in p.meta:
                raise UserError(
                    "data.self_play.rows", str(p.origin), "self-play needs rows with an answer: prompt/completion or messages"
                )
        numbers = (
            in_turn(len(prompts), self.take, ctx.round * self.take, ctx.seed, "self-play") if self.take else range(len(prompts))
        )
        sampling = Sampling(self.max_new, self.temperature)
        made = respond(ctx, ctx.base.model, [prompts[n].ids for n in numbers], sampling, 0, range(len(numbers)))
        for n, ids in zip(numbers, made.ids, strict=True):
            own, given = ctx.base.tokenizer.decode(ids, skip_special_tokens=True), prompts[n].meta["answer"]
            pair = row(prompts[n], chosen=given, rejected=own, round=ctx.round)
            if own == given or not own.strip():
                yield {
                    **pair,
                    "rejected_because": "the model says what was given" if own == given else "the model says nothing",
                }
            else:
                yield pair
        if self.mix and ctx.before is not None:
            for line in ctx.before.read_text(encoding="utf-8").splitlines():
                if (old := json.loads(line))["round"] == ctx.round - 1:
                    yield old
