from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from temperament.engine.encoded import collate
from temperament.engine.responses import TOGETHER, answered, in_turn, judged, read_prompts, respond
from temperament.engine.tokens import Sampling
from temperament.nn import draws
from temperament.nn.batch import Tokens
from temperament.nn.logprobs import label, score
from temperament.parts import part
from temperament.protocols import Examples, Reward


@part("rollout.raft", papers=["025"], modalities=("text",))
@dataclass(frozen=True)
class RAFT:
    """Reward-ranked fine-tuning: in stages, sample k responses to each prompt, keep the best, train on them as text.

        local    of the k responses y ~ p(. | x) to each prompt the one of highest reward:  density  k F(r)^(k-1) p(y)
        global   of all k * stage responses the best 1/k, whatever their prompt (only if rewards compare across prompts)
        ranked by  r(x, y) - beta (log p(y | x) - log p_ref(y | x))            over the whole response, nats

    A stage is `stage` prompts in turn, sampled from the model as it stands then, kept for `epochs` passes. What a stage kept is
    state: a run killed inside goes on with the same texts. k = 1 is training on one's own samples, which changes nothing on
    average.
    Logged: mean reward of the samples and of the kept, share of distinct responses. Source: Dong et al. 2023 (paper 025).
    """

    prompts: Examples  # rows with a prompt; an answer column (or completion) for the rewards
    rewards: list[Reward]  # what scores a response
    weights: list[float] = field(default_factory=list)  # one a reward; empty: all 1
    k: int = 8  # responses to each prompt
    stage: int = 64  # prompts of a stage; as many responses are kept
    epochs: int = 1  # passes over what a stage kept
    ranking: Literal["local", "global"] = "local"  # best of each prompt, or best of all
    beta: float = 0.0  # how much being more likely than under the reference counts against a response
    reference: str = "start"  # version that is meant
    max_new: int = 64  # tokens a response may have
    temperature: float = 1.0  # of sampling; higher is more diverse

    yields: ClassVar = ("Tokens",)
    generates: ClassVar = True

    def __post_init__(self):
        if min(self.k, self.stage, self.epochs) < 1:
            raise ValueError("k, stage and epochs must be at least 1")
        if self.weights and len(self.weights) != len(self.rewards):
            raise ValueError(f"{len(self.rewards)} rewards need as many weights, got {len(self.weights)}")
        if self.temperature <= 0:
            raise ValueError("temperature must be above 0: greedy responses are all alike")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.reference,) if self.beta else ()

    @property
    def together(self) -> int:
        """Responses that are sampled at once."""
        return min(TOGETHER, self.stage * self.k)

    def open(self, ctx: Any) -> Stream:
        return Stream(self, ctx)

    def suites(self) -> list[dict]:
        return self.prompts.suites() if hasattr(self.prompts, "suites") else []


class Stream:
    def __init__(self, spec: RAFT, ctx: Any):
        self.spec, self.ctx = spec, ctx
        self.prompts = read_prompts(spec.prompts.examples(ctx), ctx)
        self.pass_steps = -(-spec.stage // ctx.batch)  # steps of one pass over what a stage kept
        self.steps_per_epoch = max(round(len(self.prompts) / spec.stage), 1) * self.pass_steps * spec.epochs
        self.stage, self.kept, self.told = -1, [], {}  # kept: [prompt, response ids]

    def batch(self, step: int, progress: Any = None) -> Tokens:
        stage, place = divmod(step, self.pass_steps * self.spec.epochs)
        if stage != self.stage:
            self._begin(stage)
        epoch, i = divmod(place, self.pass_steps)
        order = draws.permutation(len(self.kept), self.ctx.seed, f"raft/{stage}", epoch).tolist()
        rows = [self.kept[j] for j in order[i * self.ctx.batch : (i + 1) * self.ctx.batch]]
        return collate([answered(self.prompts[n], ids, n) for n, ids in rows])

    def _begin(self, stage: int) -> None:
        """Sample, score, keep."""
        spec, ctx = self.spec, self.ctx
        chosen = in_turn(len(self.prompts), spec.stage, stage * spec.stage, ctx.seed)
        numbers = [p for p in chosen for _ in range(spec.k)]
        # A prompt may come twice in a stage: a response is addressed by its place in it.
        made = respond(
            ctx,
            ctx.live.view("live"),
            [self.prompts[n].ids for n in numbers],
            Sampling(spec.max_new, spec.temperature),
            stage,
            list(range(len(numbers))),
        )
        texts = [ctx.base.tokenizer.decode(i, skip_special_tokens=True) for i in made.ids]
        rewards: list[float] = []
        for i, p in enumerate(chosen):
            rewards += judged(spec.rewards, spec.weights, self.prompts[p], texts[i * spec.k : (i + 1) * spec.k])
        value = torch.tensor(rewards)
        if spec.beta:
            tokens, logp, _ = made.batch([self.prompts[n].ids for n in numbers])
            theirs = ctx.views.precompute(
                spec.reference, tokens, lambda m, t: (score(m, t, label())["label"] * t.weights).sum(1)
            )
            value = value - spec.beta * ((logp * tokens.weights).sum(1) - theirs)
        best = keep(value, spec.k, spec.ranking)
        self.stage, self.kept = stage, [[numbers[i], made.ids[i]] for i in best]
        distinct = len({(n, tuple(r)) for n, r in zip(numbers, made.ids, strict=True)}) / len(numbers)
        self.told = {
            "reward": sum(rewards) / len(rewards),
            "kept_reward": sum(rewards[i] for i in best) / len(best),
            "distinct": distinct,
        }

    def feedback(self, batches: list, row: dict) -> dict[str, float]:
        return self.told

    def state_dict(self) -> dict[str, Any]:
        return {"json": {"stage": self.stage, "kept": self.kept, "told": self.told}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage, self.kept, self.told = (state["json"][k] for k in ("stage", "kept", "told"))


def keep(value: torch.Tensor, k: int, ranking: str) -> list[int]:
    """Rows that are kept of value (prompts * k,): the best of each prompt, or the best 1/k of all; the earlier of equals."""
    if ranking == "local":
        groups = value.view(-1, k)
        return (groups.sort(dim=1, descending=True, stable=True).indices[:, 0] + k * torch.arange(len(groups))).tolist()
    return sorted(value.sort(descending=True, stable=True).indices[: len(value) // k].tolist())
