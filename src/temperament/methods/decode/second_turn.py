from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from temperament.engine.tokens import Generated, Sampling, end_tokens, generate
from temperament.engine.turns import INSTRUCTION, TEXT, Again
from temperament.parts import part

APART = 1 << 40  # between the addresses of an answer's draws and its second's: those of a row, whatever stands beside it


@part("decode.second_turn", papers=["174"], modalities=("text",))
@dataclass(frozen=True)
class SecondTurn:
    """Answer, look at the answer, answer again: the system's answer is that of the second turn. Twice the tokens.

        y1 = model(x1),   y2 = model(x1, y1, `again`)          y2 is what is measured; without this part, y1

    For models that learned to correct themselves (rollout.two_turn, with the same words between the turns): what the ledger
    gains by it over the weights alone is the self-correction. No verdict on y1 is asked for. Source: Kumar et al. 2024, SCoRe
    (paper 174).
    """

    again: str = TEXT  # plain text between the answers; {prompt} is the question once more
    instruction: str = INSTRUCTION  # the message between them where prompts are messages

    def hooks(self, base: Any) -> list[Any]:
        return [_Asks(Again(base.tokenizer, self.again, self.instruction))]

    @property
    def loop(self) -> Any:
        return twice


@dataclass(frozen=True)
class _Asks:
    """What the loop below finds among the hooks: they know the base, a loop does not."""

    again: Again


def twice(
    models: dict[str, Any],
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    hooks: Sequence[Any] = (),
    examples: Sequence[int] | None = None,
    **how: Any,
) -> Generated:
    """As engine.tokens.generate, the answers being second ones."""
    asks, others = next(h for h in hooks if isinstance(h, _Asks)), [h for h in hooks if not isinstance(h, _Asks)]
    numbers = list(range(len(prompts))) if examples is None else list(examples)
    first = generate(models, prompts, sampling, hooks=others, examples=numbers, **how)
    ends = end_tokens(next(iter(models.values())))
    then = [asks.again.prompt(x, y, ends) for x, y in zip(prompts, first.ids, strict=True)]
    # (at a temperature the second answers are other draws than the first)
    second = generate(models, then, sampling, hooks=others, examples=[APART + e for e in numbers], **how)
    second.tokens += first.tokens
    return second
