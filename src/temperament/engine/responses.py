"""Responses of a model to prompts, and what rewards say of them: what rollouts, self-training and self-play are made of.

    prompts = read_prompts(examples, ctx)                 encoded, with what was the answer kept for the rewards
    taken = in_turn(len(prompts), count, start, seed)     an endless sequence of permutations
    made = respond(ctx, model, ids, sampling, step, examples)     the same on every process
    marks = judged(rewards, weights, prompt, texts)

A response is addressed by (seed, round, step, example, position), so a build that is made again and a rollout that is
resumed say the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from temperament.engine.encode import encode_all
from temperament.engine.encoded import Encoded, EncodedPrompt
from temperament.engine.examples import Chat, Completion, Example, Prompt
from temperament.engine.tokens import Generated, Sampling, generate
from temperament.errors import UserError
from temperament.nn import draws

TOGETHER = 256  # responses made at once, unless it is said otherwise
ROUND = 1 << 24  # steps a round may have before its draws meet those of the next


def read_prompts(examples: Sequence[Example], ctx: Any) -> list[EncodedPrompt]:
    """Encoded up to the answer to come, in order."""
    return encode_all([as_prompt(e) for e in examples], ctx.base.tokenizer)[0]


def as_prompt(example: Example) -> Prompt:
    """Rows with an answer become prompts; what was the answer is kept for the rewards as `answer`."""
    if isinstance(example, Prompt):
        return example
    common = {"origin": example.origin, "tools": example.tools, "options": example.options}
    if isinstance(example, Completion):
        answer = example.completion if isinstance(example.completion, str) else example.completion[-1]["content"]
        return Prompt(example.prompt, meta={"answer": answer, "completion": answer, **example.meta}, **common)
    if isinstance(example, Chat):
        last = max(i for i, m in enumerate(example.messages) if m["role"] == "assistant")
        return Prompt(example.messages[:last], meta={"answer": example.messages[last]["content"], **example.meta}, **common)
    raise UserError("prompts", type(example).__name__.lower(), "rows need a prompt: prompt, prompt/completion or messages")


def in_turn(n: int, count: int, start: int, seed: int, purpose: str = "rollout/prompts") -> list[int]:
    """`count` of n things from place `start` of the endless sequence of their permutations."""
    out: list[int] = []
    order: list[int] = []
    for k in range(start, start + count):
        epoch, place = divmod(k, n)
        if not order or place == 0:
            order = draws.permutation(n, seed, purpose, epoch).tolist()
        out.append(order[place])
    return out


def told_apart(chosen: Sequence[int], n: int) -> list[int]:
    """Numbers of the n things chosen, of which one that comes again in a step is another: p, then p + n, p + 2 n, ..."""
    seen: dict[int, int] = {}
    out = []
    for p in chosen:
        out.append(p + n * seen.get(p, 0))
        seen[p] = seen.get(p, 0) + 1
    return out


def respond(
    ctx: Any,
    model: Any,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    step: int,
    examples: Sequence[int],
    batch: int = TOGETHER,
) -> Generated:
    """A response to each of the prompts, shared out over the processes and put together again on each."""
    world = ctx.world
    mine = list(range(world.rank, len(prompts), world.size))
    with world.autocast():
        made = generate(model, [prompts[i] for i in mine], sampling, seed=ctx.seed, step=step + ROUND * ctx.round,
                        examples=[examples[i] for i in mine], batch=batch,
                        decode=getattr(ctx.base.tokenizer, "decode", None))  # fmt: skip
    rows = list(zip(made.ids, made.sampled, made.logp, made.sampling_logp, made.finished, strict=True))
    rows = world.gather_rows(rows, len(prompts))
    made.ids, made.sampled, made.logp, made.sampling_logp, made.finished = (list(c) for c in zip(*rows, strict=True))
    made.tokens = sum(int(drawn.sum()) for drawn in made.sampled)
    return made


def judged(rewards: Sequence[Any], weights: Sequence[float], prompt: EncodedPrompt, texts: Sequence[str]) -> list[float]:
    """The weighted sum of what the rewards say of each response to one prompt; one that does not apply adds nothing."""
    total = [0.0] * len(texts)
    for weight, reward in zip(weights or [1.0] * len(rewards), rewards, strict=True):
        for k, mark in enumerate(reward.score(prompt.prompt, texts, prompt.meta)):
            total[k] += weight * (mark or 0.0)
    return total


def answered(prompt: EncodedPrompt, ids: Sequence[int], number: int = 0) -> Encoded:
    """The document of a prompt and a response, to be trained on the response."""
    weights = [0.0] * len(prompt.ids) + [1.0] * len(ids)
    return Encoded([*prompt.ids, *ids], weights, origin=prompt.origin, meta=dict(prompt.meta), number=number)


def said(prompt: EncodedPrompt, text: str) -> str | list[dict[str, str]]:
    """A response in the form of its prompt: text, or a message."""
    return text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]


def row(prompt: EncodedPrompt, **columns: Any) -> Mapping[str, Any]:
    """A row of data for this prompt; text in the columns named as responses takes the form of the prompt."""
    form = {k: said(prompt, v) if k in ("completion", "chosen", "rejected") else v for k, v in columns.items()}
    return {"prompt": prompt.prompt, **form}
