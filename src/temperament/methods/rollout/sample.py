from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from temperament.engine.encode import encode_all
from temperament.engine.examples import Chat, Completion, Prompt
from temperament.engine.tokens import Sampling, generate
from temperament.errors import UserError
from temperament.nn import draws
from temperament.nn.batch import Rollout
from temperament.parts import at, part
from temperament.protocols import Examples, Reward


@part("rollout.sample", modalities=("text",))
@dataclass(frozen=True)
class Sample:
    """Groups of responses sampled from the policy as it stands, scored by verifiers: what GRPO and its kin train on.

    Each step takes batch / group prompts (a permutation of them each epoch), samples `group` responses to each, and scores a response by
    the weighted sum of its rewards; a reward that does not apply (None) adds nothing. The log-probs a response was sampled with come from
    the generation itself, so the policy is not run again for them. Draws are addressed by (seed, step, prompt, sample, position):
    resuming in the middle gives the same responses. The loop does not know that this is not a file.
    """

    prompts: Examples  # rows with a prompt; an answer column (or completion) for the rewards
    rewards: list[Reward]  # what scores a response
    weights: list[float] = field(default_factory=list)  # one a reward; empty: all 1
    group: int = 8  # responses to each prompt
    max_new: int = 64  # tokens a response may have
    temperature: float = 1.0  # of sampling; the policy that is optimised is the one that samples only at 1
    min_new: int = 0  # no end token before so many

    yields: ClassVar = ("Rollout",)
    scheduled: ClassVar = ("temperature", "weights")

    def __post_init__(self):
        if self.group < 2:
            raise ValueError("group must be at least 2: a response is judged against the others of its group")
        if self.weights and len(self.weights) != len(self.rewards):
            raise ValueError(f"{len(self.rewards)} rewards need as many weights, got {len(self.weights)}")
        if isinstance(self.temperature, (int, float)) and self.temperature <= 0:
            raise ValueError("temperature must be above 0: greedy responses are all alike")

    def open(self, ctx: Any) -> Stream:
        if ctx.batch % self.group:
            raise UserError("train.batch", ctx.batch, f"it must be a multiple of the group ({self.group}), e.g. {self.group * max(ctx.batch // self.group, 1)}")
        return Stream(self, ctx)

    def suites(self) -> list[dict]:
        return self.prompts.suites() if hasattr(self.prompts, "suites") else []


class Stream:
    def __init__(self, spec: Sample, ctx: Any):
        self.spec, self.ctx = spec, ctx
        examples = [_as_prompt(e) for e in spec.prompts.examples(ctx)]
        self.prompts, _ = encode_all(examples, ctx.base.tokenizer)
        self.size = ctx.batch // spec.group
        self.steps_per_epoch = max(-(-len(self.prompts) // self.size), 1)

    def chosen(self, step: int) -> list[int]:
        """Which prompts step `step` takes: `size` in a row of the endless sequence of permutations."""
        n, out = len(self.prompts), []
        for k in range(step * self.size, (step + 1) * self.size):
            epoch, place = divmod(k, n)
            if not out or place == 0:
                order = draws.permutation(n, self.ctx.seed, "rollout/prompts", epoch).tolist()
            out.append(order[place])
        return out

    def batch(self, step: int, progress: Any = None) -> Rollout:
        spec, world = at(self.spec, progress) if progress is not None else self.spec, self.ctx.world
        numbers = [p for p in self.chosen(step) for _ in range(spec.group)]
        # A response is addressed by its prompt and its place in the group, within this step.
        examples = [p * spec.group + i % spec.group for i, p in enumerate(numbers)]
        mine = list(range(world.rank, len(numbers), world.size))
        sampling = Sampling(max_new=spec.max_new, temperature=spec.temperature, min_new=spec.min_new)
        with world.autocast():
            made = generate(self.ctx.live.view("live"), [self.prompts[numbers[i]].ids for i in mine], sampling, seed=self.ctx.seed,
                            step=step, examples=[examples[i] for i in mine], batch=max(len(mine), 1))  # fmt: skip
        rows = world.gather_rows(list(zip(made.ids, made.sampled, made.logp, made.sampling_logp, strict=True)), len(numbers))
        made.ids, made.sampled, made.logp, made.sampling_logp = (list(c) for c in zip(*rows, strict=True))
        tokens, behaviour, _ = made.batch([self.prompts[n].ids for n in numbers], examples)
        rewards = torch.tensor(self.score(numbers, made.ids, spec), dtype=torch.float32)
        return Rollout(tokens, behaviour, rewards, torch.tensor(numbers))

    def score(self, numbers: list[int], ids: list[list[int]], spec: Sample | None = None) -> list[float]:
        spec = spec or self.spec
        texts = [self.ctx.base.tokenizer.decode(i, skip_special_tokens=True) for i in ids]
        weights = spec.weights or [1.0] * len(spec.rewards)
        total = [0.0] * len(texts)
        for start in range(0, len(texts), spec.group):
            prompt = self.prompts[numbers[start]]
            for weight, reward in zip(weights, spec.rewards, strict=True):
                marks = reward.score(prompt.prompt, texts[start : start + spec.group], prompt.meta)
                for k, mark in enumerate(marks):
                    total[start + k] += weight * (mark or 0.0)
        return total


def _as_prompt(example: Any) -> Prompt:
    """Rows with an answer become prompts; what was the answer is kept for the rewards as `answer`."""
    if isinstance(example, Prompt):
        return example
    if isinstance(example, Completion):
        answer = example.completion if isinstance(example.completion, str) else example.completion[-1]["content"]
        meta: Mapping = {"answer": answer, "completion": answer, **example.meta}
        return Prompt(example.prompt, origin=example.origin, meta=dict(meta), tools=example.tools, options=example.options)
    if isinstance(example, Chat):
        last = max(i for i, m in enumerate(example.messages) if m["role"] == "assistant")
        answer = example.messages[last]["content"]
        return Prompt(example.messages[:last], origin=example.origin, meta={"answer": answer, **example.meta}, tools=example.tools, options=example.options)
    raise UserError("rollout.sample.prompts", type(example).__name__.lower(), "rows need a prompt: prompt, prompt/completion or messages")
