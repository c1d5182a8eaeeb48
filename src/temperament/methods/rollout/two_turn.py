from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from temperament.engine.responses import in_turn, judged, read_prompts, respond, told_apart
from temperament.engine.tokens import Generated, Sampling, end_tokens
from temperament.engine.turns import INSTRUCTION, TEXT, Again
from temperament.errors import UserError
from temperament.nn.batch import Rollout
from temperament.parts import at, number, part
from temperament.protocols import Examples, Reward


@part("rollout.two_turn", papers=["174"], modalities=("text",))
@dataclass(frozen=True)
class TwoTurn:
    """Answers, and second answers by the same policy, which sees the first one and is asked to correct it; no verdict is shown.

        y1 ~ pi(. | x1),   y2 ~ pi(. | x2),  x2 = x1, y1, `again`
        reward of y1:  r1 + gamma r2          of y2:  r2 + alpha (r2 - r1)            r: the verifier's, seen in training only

    alpha is the progress bonus: mending pays it, spoiling costs it, and a second answer that is as good as the first gets
    none. It is the second turn's alone: credited to the first it would pay for failing there. A conversation is two rows, all
    first ones before all second ones, each a prompt and what was sampled; `turn` says which, and groups are of one prompt and
    one turn: GRPO on this is plain two-turn reinforcement. Logged: share right at each turn, share of all that was mended and
    spoiled. Source: Kumar et al. 2024, SCoRe (paper 174): alpha 10.
    """

    prompts: Examples  # rows with a prompt; an answer column (or completion) for the rewards
    rewards: list[Reward]  # what scores an answer
    weights: list[float] = field(default_factory=list)  # one a reward; empty: all 1
    group: int = 4  # conversations on each prompt
    alpha: float = 0.0  # progress bonus; may be a schedule
    gamma: float = 0.0  # share of the second reward that the first answer is credited with
    again: str = TEXT  # plain text between the answers; {prompt} is the question once more
    instruction: str = INSTRUCTION  # the message between them where prompts are messages
    max_new: int = 64  # tokens an answer may have
    temperature: float = 1.0  # of sampling; the policy that is optimised is the one that samples only at 1

    yields: ClassVar = ("Rollout",)
    generates: ClassVar = True
    scheduled: ClassVar = ("temperature", "weights", "alpha")

    def __post_init__(self):
        if self.group < 2:
            raise ValueError("group must be at least 2: an answer is judged against the others of its group")
        if self.weights and len(self.weights) != len(self.rewards):
            raise ValueError(f"{len(self.rewards)} rewards need as many weights, got {len(self.weights)}")
        if number(self.temperature, 1.0) <= 0:
            raise ValueError("temperature must be above 0: greedy answers are all alike")

    def open(self, ctx: Any) -> Stream:
        rows = 2 * self.group
        if ctx.batch % rows:
            mend = f"it must be a multiple of two turns of a group ({rows}), e.g. {rows * max(ctx.batch // rows, 1)}"
            raise UserError("train.batch", ctx.batch, mend)
        return Stream(self, ctx)

    def suites(self) -> list[dict]:
        return self.prompts.suites() if hasattr(self.prompts, "suites") else []


class Stream:
    def __init__(self, spec: TwoTurn, ctx: Any):
        self.spec, self.ctx = spec, ctx
        self.prompts = read_prompts(spec.prompts.examples(ctx), ctx)
        self.again = Again(ctx.base.tokenizer, spec.again, spec.instruction)
        self.size = ctx.batch // (2 * spec.group)
        self.steps_per_epoch = max(-(-len(self.prompts) // self.size), 1)
        self.told: dict[str, float] = {}

    @property
    def asked_tokens(self) -> int:
        """Of the longest prompt, that of a second turn."""
        return max(len(self.again.prompt(p.ids, [0] * self.spec.max_new)) for p in self.prompts)

    def batch(self, step: int, progress: Any = None) -> Rollout:
        spec, ctx, n = at(self.spec, progress) if progress is not None else self.spec, self.ctx, len(self.prompts)
        chosen = in_turn(n, self.size, step * self.size, ctx.seed)
        numbers = [p for p in chosen for _ in range(spec.group)]
        groups = [g for g in told_apart(chosen, n) for _ in range(spec.group)]  # a prompt that comes again is another group
        n *= max(groups) // n + 1
        sampling = Sampling(max_new=spec.max_new, temperature=spec.temperature)
        asked, made, marks = [[self.prompts[p].ids for p in numbers]], [], []
        # An answer is addressed by its prompt, its place in the group and its turn, within this step.
        places = [g * spec.group + i % spec.group for i, g in enumerate(groups)]
        examples = [places, [n * spec.group + e for e in places]]
        ends = end_tokens(ctx.live.view("live"))
        for turn in (0, 1):
            made.append(respond(ctx, ctx.live.view("live"), asked[turn], sampling, step, examples[turn], batch=len(numbers)))
            marks.append(self._marks(spec, numbers, made[turn].ids))
            if turn == 0:
                asked.append([self.again.prompt(x, y, ends) for x, y in zip(asked[0], made[0].ids, strict=True)])
        first, second = (torch.tensor(m, dtype=torch.float32) for m in marks)
        told = {"right_1": first.mean(), "right_2": second.mean(), "mended": (second - first).clamp(min=0).mean(),
                "spoiled": (first - second).clamp(min=0).mean()}  # fmt: skip
        self.told = {name: float(v) for name, v in told.items()}
        rewards = torch.cat([first + spec.gamma * second, second + spec.alpha * (second - first)])
        tokens, behaviour, _ = both(*made).batch([*asked[0], *asked[1]], [*examples[0], *examples[1]])
        prompt, turn = torch.tensor(groups), torch.arange(2).repeat_interleave(len(numbers))
        return Rollout(tokens, behaviour, rewards, prompt.repeat(2) + n * turn, turn=turn)

    def _marks(self, spec: TwoTurn, numbers: list[int], made: list[list[int]]) -> list[float]:
        texts = [self.ctx.base.tokenizer.decode(ids, skip_special_tokens=True) for ids in made]
        starts = range(0, len(numbers), spec.group)
        marks = lambda i: judged(spec.rewards, spec.weights, self.prompts[numbers[i]], texts[i : i + spec.group])
        return [m for i in starts for m in marks(i)]

    def feedback(self, batches: list, row: dict) -> dict[str, float]:
        return self.told


def both(a: Generated, b: Generated) -> Generated:
    join = lambda name: [*getattr(a, name), *getattr(b, name)]
    return Generated(*(join(n) for n in ("ids", "sampled", "logp", "sampling_logp", "finished")), tokens=a.tokens + b.tokens)
