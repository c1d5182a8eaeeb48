from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from temperament.engine.encode import encode_all
from temperament.engine.encoded import collate
from temperament.engine.examples import Completion
from temperament.errors import UserError
from temperament.nn.batch import Batch, Rollout
from temperament.parts import part
from temperament.protocols import Examples, Source


@part("rollout.relift", papers=["217"], modalities=("text",))
@dataclass(frozen=True)
class ReLIFT:
    """Reinforcement interleaved with supervision on what it cannot reach: a rollout each step, demonstrations when due.

        all of a group marked `failed`    ->  its question goes to the front of a buffer (not of mixed groups, broken formats)
        the buffer holds `due` questions  ->  the first `due` leave it; their demonstrations are a second batch of this step

    The rollout trains the main player; the demonstrations (a batch of `Tokens`) train a player that shares its weights and has
    an optimizer of its own: moments, rate, clipping. So the share of supervision follows what is still unsolved. The buffer is
    state: a run that was killed goes on with it. due larger than all questions is reinforcement alone. Source: Ma et al. 2025
    (paper 217): 128 due, reward 1, 0, -1.
    """

    rollout: Source  # what is sampled and scored: {rollout.sample: ...}
    demonstrations: Examples  # rows with the same prompts and the answers to learn where all samples fail
    due: int = 16  # questions that make a supervised batch
    failed: float = 0.0  # reward of a wrong answer in a proper format

    yields: ClassVar = ("Rollout", "Tokens")

    def __post_init__(self):
        if self.due < 1:
            raise ValueError("due must be at least 1")

    def open(self, ctx: Any) -> Stream:
        return Stream(self, ctx)

    def suites(self) -> list[dict]:
        return self.rollout.suites() if hasattr(self.rollout, "suites") else []


@dataclass
class Stream:
    spec: ReLIFT
    ctx: Any
    buffer: list[int] = field(default_factory=list)  # prompts, newest first
    shown: int = 0  # demonstrations given so far

    def __post_init__(self):
        self.inner = self.spec.rollout.open(self.ctx)
        self.steps_per_epoch = self.inner.steps_per_epoch
        rows = [e for e in self.spec.demonstrations.examples(self.ctx) if isinstance(e, Completion)]
        known = {repr(e.prompt): e for e in rows}
        found = [known.get(repr(p.prompt)) for p in self.inner.prompts]
        if any(e is None for e in found):
            missing = found.index(None)
            raise UserError(
                "rollout.relift.demonstrations",
                str(self.inner.prompts[missing].prompt)[:60],
                "it has no row for this prompt; give one for each",
            )
        self.answers, _ = encode_all(found, self.ctx.base.tokenizer)

    @property
    def prompts(self) -> list[Any]:
        return self.inner.prompts

    def batch(self, step: int, progress: Any = None) -> Batch | list[Batch]:
        rollout = self.inner.batch(step, progress)
        # A prompt that came twice in a step is two groups (engine/responses.py, `told_apart`) of one question.
        failed = dict.fromkeys(g % len(self.answers) for g in hard(rollout, self.spec.failed))
        self.buffer = [p for p in failed if p not in self.buffer] + self.buffer
        if len(self.buffer) < self.spec.due:
            return [rollout]
        taken, self.buffer = self.buffer[: self.spec.due], self.buffer[self.spec.due :]
        self.shown += len(taken)
        return [rollout, collate([self.answers[p] for p in taken])]

    def feedback(self, batches: list, row: dict) -> dict[str, float]:
        return {"buffer": len(self.buffer), "demonstrations": self.shown}

    def state_dict(self) -> dict[str, Any]:
        return {"json": {"buffer": self.buffer, "shown": self.shown}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer, self.shown = state["json"]["buffer"], state["json"]["shown"]


def hard(rollout: Rollout, failed: float) -> list[int]:
    """The groups all of whose rewards are `failed`, newest first."""
    rewards: dict[int, list[float]] = {}
    for g, r in zip(rollout.group.tolist(), rollout.rewards.tolist(), strict=True):
        rewards.setdefault(g, []).append(r)
    return [g for g, rs in rewards.items() if all(r == failed for r in rs)][::-1]
