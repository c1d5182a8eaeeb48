from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from temperament.engine.encoded import EncodedPrompt
from temperament.engine.measure import System, likelihood
from temperament.engine.responses import answered, read_prompts, respond, row
from temperament.engine.tokens import Sampling
from temperament.errors import UserError, nearest
from temperament.parts import part
from temperament.protocols import Examples


@part("data.s3ft", papers=["094"], modalities=("text",))
@dataclass(frozen=True)
class S3FT:
    """Selective self-to-supervised rows: what the model already says where that is right, else the given answer.

        1  its own greedy answer, then up to `retries` sampled ones: the first the judge accepts
        2  else its own rewriting of the given answer (`paraphrase`), if the judge accepts it
        3  else the given answer

    Such targets are likely under the model, so the weights move less. A `build` step; the judge is the recipe's aide of that
    name. Rows: prompt, completion, source (own, paraphrase, given), nll (nats per token under the model as it stands). Source:
    Gupta et al. 2025 (paper 094).
    """

    rows: Examples  # prompts with the answers they should get
    judge: str = "judge"  # the recipe's aide that says whether an output is as good as the answer
    retries: int = 4  # sampled answers after the greedy one
    temperature: float = 0.8  # of those
    paraphrase: str | None = None  # prompt for a rewriting, with {prompt} and {answer}; null: none is asked for
    max_new: int = 64  # tokens an own answer may have

    def __post_init__(self):
        if self.retries < 0:
            raise ValueError("retries must not be negative")
        if self.retries and self.temperature <= 0:
            raise ValueError("temperature must be above 0: greedy answers are all alike")

    def make(self, ctx: Any) -> Iterator[Mapping[str, Any]]:
        if self.judge not in ctx.aides:
            raise UserError(
                "data.s3ft.judge",
                self.judge,
                "the recipe has no aide of that name; add aides: {judge: aides.match}; "
                + (nearest(self.judge, ctx.aides) if ctx.aides else "it has none"),
            )
        prompts = read_prompts(self.rows.examples(ctx), ctx)
        for p in prompts:
            if "answer" not in p.meta:
                raise UserError("data.s3ft.rows", str(p.origin), "rows need an answer: prompt/completion or messages")
        found: dict[int, tuple[str, str]] = {}
        for k in range(self.retries + 1):
            self._fill(ctx, prompts, prompts, found, "own", self.temperature if k else 0.0, k)
        if self.paraphrase is not None:
            asked = [p.meta["answer"] and self.paraphrase.format(prompt=p.prompt, answer=p.meta["answer"]) for p in prompts]
            self._fill(ctx, prompts, self._asked(ctx, prompts, asked), found, "paraphrase", 0.0, 0)
        chosen = [found.get(i, ("given", p.meta["answer"])) for i, p in enumerate(prompts)]
        told = Counter(source for source, _ in chosen)
        ctx.tell("note", text="s3ft: " + ", ".join(f"{told[s]} {s}" for s in ("own", "paraphrase", "given")))
        tok = ctx.base.tokenizer
        documents = [
            answered(p, tok(text, add_special_tokens=False)["input_ids"]).split
            for p, (_, text) in zip(prompts, chosen, strict=True)
        ]
        nll = likelihood(documents, System(ctx.base, graded=False))["nll"]
        for p, (source, text), n in zip(prompts, chosen, nll, strict=True):
            yield row(p, completion=text, source=source, nll=n)

    def _asked(self, ctx: Any, prompts: list[EncodedPrompt], texts: list[str]) -> list[EncodedPrompt]:
        from temperament.engine.examples import Prompt

        form = lambda p, text: text if isinstance(p.prompt, str) else [{"role": "user", "content": text}]
        return [
            replace(q, meta=p.meta)
            for p, q in zip(
                prompts, read_prompts([Prompt(form(p, t)) for p, t in zip(prompts, texts, strict=True)], ctx), strict=True
            )
        ]

    def _fill(self, ctx: Any, prompts: list, asked: list, found: dict, source: str, temperature: float, step: int) -> None:
        """Ask for the rows that have no target yet; keep what the judge accepts."""
        open_rows = [i for i in range(len(prompts)) if i not in found]
        if not open_rows:
            return
        made = respond(
            ctx, ctx.base.model, [asked[i].ids for i in open_rows], Sampling(self.max_new, temperature), step, open_rows
        )
        texts = [ctx.base.tokenizer.decode(ids, skip_special_tokens=True) for ids in made.ids]
        ended = [why != "length" and bool(text.strip()) for why, text in zip(made.finished, texts, strict=True)]
        requests = [
            {"prompt": prompts[i].prompt, "answer": prompts[i].meta["answer"], "output": t, "row": prompts[i].meta}
            for i, t in zip(open_rows, texts, strict=True)
        ]
        for i, text, whole, good in zip(open_rows, texts, ended, ctx.aides[self.judge].ask(requests), strict=True):
            if whole and good:
                found[i] = (source, text)
