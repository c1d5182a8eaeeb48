from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from temperament.engine.responses import judged, read_prompts, respond, said
from temperament.engine.tokens import Sampling
from temperament.engine.turns import INSTRUCTION, TEXT
from temperament.errors import UserError
from temperament.parts import part
from temperament.protocols import Examples, Reward


@part("data.corrections", papers=["174"], modalities=("text",))
@dataclass(frozen=True)
class Corrections:
    """Rows that show a correction: the model's own first answer, the words between the turns, the answer it should have given.

        prompt = x1, y1, `again`       completion = the given answer             y1 ~ the model as this step finds it

    A `build` step. Supervision on it is the usual way to teach self-correction (Pair-SFT), and a short warm-up for
    reinforcement where a base has never met a second turn. It shows errors of a model that training then leaves. y1 is wrong
    where the rewards give it less than the given answer. Columns beside: right_1, what the rewards said of y1. Source: Kumar et
    al. 2024, SCoRe (paper 174), its baselines.
    """

    rows: Examples  # prompts with the answers they should get
    rewards: list[Reward] = field(default_factory=list)  # what scores y1; needed for first: wrong
    first: Literal["any", "wrong"] = "any"  # first answers that rows are made of
    again: str = TEXT  # plain text between the answers; {prompt} is the question once more
    instruction: str = INSTRUCTION  # the message between them where prompts are messages
    samples: int = 1  # first answers to each prompt
    max_new: int = 64  # tokens a first answer may have
    temperature: float = 1.0  # of sampling; 0: the greedy answer

    def __post_init__(self):
        if self.first == "wrong" and not self.rewards:
            raise ValueError("first: wrong needs rewards that say which answers are")
        if self.samples < 1:
            raise ValueError("samples must be at least 1")

    def make(self, ctx: Any) -> Iterator[Mapping[str, Any]]:
        prompts = read_prompts(self.rows.examples(ctx), ctx)
        for p in prompts:
            if "answer" not in p.meta:
                raise UserError("data.corrections.rows", str(p.origin), "rows need an answer: prompt/completion or messages")
        numbers = [i for i in range(len(prompts)) for _ in range(self.samples)]
        asked, sampling = [prompts[i].ids for i in numbers], Sampling(self.max_new, self.temperature)
        made = respond(ctx, ctx.base.model, asked, sampling, 0, list(range(len(numbers))))
        texts = [ctx.base.tokenizer.decode(ids, skip_special_tokens=True) for ids in made.ids]
        for i, text in zip(numbers, texts, strict=True):
            p, mark, full = prompts[i], None, 0.0
            if self.rewards:
                mark, full = judged(self.rewards, [], p, [text, p.meta["answer"]])
            if self.first == "wrong" and mark >= full:
                yield {"prompt": p.prompt, "rejected_because": "its first answer is right"}
                continue
            yield {"prompt": self.second(p.prompt, text), "completion": said(p, p.meta["answer"]), "right_1": mark}

    def second(self, prompt: str | list[dict], answer: str) -> str | list[dict]:
        if isinstance(prompt, str):
            return prompt + answer + self.again.replace("{prompt}", prompt)
        return [*prompt, {"role": "assistant", "content": answer}, {"role": "user", "content": self.instruction}]
