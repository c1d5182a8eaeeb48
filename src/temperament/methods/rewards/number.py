from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from temperament.engine.numbers import last_number
from temperament.errors import UserError
from temperament.parts import part


@part("rewards.number", papers=["213"], modalities=("text",))
@dataclass(frozen=True)
class Number:
    """1 where the last number of the response is the last number of the expected answer; else 0. Parses, never evaluates.

    partial: what a response gets in which a wrong number can be read (ReFT: 0.1); one without any number gets 0. Not for
    multiple choice, where it pays for guessing.
    """

    column: str = "answer"  # column of the row that holds the expected answer
    partial: float = 0.0  # mark of a wrong number

    def score(self, prompt: Any, outputs: Sequence[str], row: Mapping[str, Any]) -> list[float | None]:
        if self.column not in row:
            raise UserError(
                "rewards.number.column",
                self.column,
                f"the rows have no such column; they have {', '.join(sorted(map(str, row)))}",
            )
        want = last_number(str(row[self.column]))
        said = [last_number(o) for o in outputs]
        return [None if want is None else 1.0 if s == want else 0.0 if s is None else self.partial for s in said]
