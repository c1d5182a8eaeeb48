from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from temperament.engine.responses import in_turn, judged, read_prompts, respond, told_apart
from temperament.engine.tokens import Sampling
from temperament.errors import UserError
from temperament.nn.batch import Rollout
from temperament.parts import at, number, part
from temperament.protocols import Examples, Reward


@part("rollout.sample", modalities=("text",))
@dataclass(frozen=True)
class Sample:
    """Groups of responses sampled from the policy as it stands, scored by verifiers: what GRPO and its kin train on.

    Each step takes batch / group prompts (a permutation of them each epoch), samples `group` responses to each, and scores a
    response by the weighted sum of its rewards; a reward that does not apply (None) adds nothing. The log-probs a response was
    sampled with come from the generation itself, so the policy is not run again for them. Draws are addressed by (seed, step,
    prompt, sample, position): resuming in the middle gives the same responses. The loop does not know that this is not a file.
    """

    prompts: Examples  # rows with a prompt; an answer column (or completion) for the rewards
    rewards: list[Reward]  # what scores a response
    weights: list[float] = field(default_factory=list)  # one a reward; empty: all 1
    group: int = 8  # responses to each prompt
    max_new: int = 64  # tokens a response may have
    temperature: float = 1.0  # of sampling; the policy that is optimised is the one that samples only at 1
    min_new: int = 0  # no end token before so many

    yields: ClassVar = ("Rollout",)
    generates: ClassVar = True
    scheduled: ClassVar = ("temperature", "weights")

    def __post_init__(self):
        if self.group < 2:
            raise ValueError("group must be at least 2: a response is judged against the others of its group")
        if self.weights and len(self.weights) != len(self.rewards):
            raise ValueError(f"{len(self.rewards)} rewards need as many weights, got {len(self.weights)}")
        if number(self.temperature, 1.0) <= 0:
            raise ValueError("temperature must be above 0: greedy responses are all alike")

    def open(self, ctx: Any) -> Stream:
        if ctx.batch % self.group:
            raise UserError(
                "train.batch",
                ctx.batch,
                f"it must be a multiple of the group ({self.group}), e.g. {self.group * max(ctx.batch // self.group, 1)}",
            )
        return Stream(self, ctx)

    def suites(self) -> list[dict]:
        return self.prompts.suites() if hasattr(self.prompts, "suites") else []


class Stream:
    def __init__(self, spec: Sample, ctx: Any):
        self.spec, self.ctx = spec, ctx
        self.prompts = read_prompts(spec.prompts.examples(ctx), ctx)
        self.size = ctx.batch // spec.group
        self.steps_per_epoch = max(-(-len(self.prompts) // self.size), 1)

    def batch(self, step: int, progress: Any = None) -> Rollout:
        spec, ctx = at(self.spec, progress) if progress is not None else self.spec, self.ctx
        chosen = in_turn(len(self.prompts), self.size, step * self.size, ctx.seed)
        numbers = [p for p in chosen for _ in range(spec.group)]
        # A response is addressed by its prompt and its place in the group, within this step. Where a step takes more prompts
        # than there are, one that comes again is a group of its own.
        groups_of = [g for g in told_apart(chosen, len(self.prompts)) for _ in range(spec.group)]
        examples = [g * spec.group + i % spec.group for i, g in enumerate(groups_of)]
        ids = [self.prompts[n].ids for n in numbers]
        sampling = Sampling(max_new=spec.max_new, temperature=spec.temperature, min_new=spec.min_new)
        made = respond(ctx, ctx.live.view("live"), ids, sampling, step, examples, batch=len(ids))
        tokens, behaviour, _ = made.batch(ids, examples)
        texts = [ctx.base.tokenizer.decode(i, skip_special_tokens=True) for i in made.ids]
        groups = [(self.prompts[p], texts[i * spec.group : (i + 1) * spec.group]) for i, p in enumerate(chosen)]
        rewards = [mark for prompt, said in groups for mark in judged(spec.rewards, spec.weights, prompt, said)]
        return Rollout(tokens, behaviour, torch.tensor(rewards, dtype=torch.float32), torch.tensor(groups_of))
