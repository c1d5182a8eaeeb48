from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from temperament.engine.numbers import last_number
from temperament.parts import part


@part("aides.match", modalities=("text",))
@dataclass(frozen=True)
class Match:
    """A judge that compares an output with the expected answer: equal, the answer within it, or the same last number.

    Asked {"prompt", "answer", "output"}, it says whether the output is as good as the answer. White space apart. By number
    1,000 is 1000.0; it parses, never evaluates.
    """

    role: ClassVar = "judge"
    by: Literal["text", "contains", "number"] = "text"  # what must agree

    def ask(self, requests: Sequence[Mapping[str, Any]]) -> list[bool]:
        return [self._same(str(r["output"]), str(r["answer"])) for r in requests]

    def _same(self, output: str, answer: str) -> bool:
        said, want = " ".join(output.split()), " ".join(answer.split())
        if self.by == "number":
            return (number := last_number(want)) is not None and last_number(said) == number
        return bool(want) and (want in said if self.by == "contains" else said == want)
