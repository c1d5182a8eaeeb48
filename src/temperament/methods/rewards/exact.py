from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from temperament.errors import UserError
from temperament.parts import part


@part("rewards.exact", modalities=("text",))
@dataclass(frozen=True)
class Exact:
    """1 where the response is the expected answer, white space apart; else 0.

    A verifier: it compares, it never runs anything.
    """

    column: str = "answer"  # column of the row that holds the expected answer

    def score(self, prompt: Any, outputs: Sequence[str], row: Mapping[str, Any]) -> list[float | None]:
        want = " ".join(str(needed(row, self.column)).split())
        return [float(" ".join(o.split()) == want) for o in outputs]


def needed(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise UserError(
            "rewards.column", column, f"the rows have no such column; they have {', '.join(sorted(map(str, row))) or 'none'}"
        )
    return row[column]
