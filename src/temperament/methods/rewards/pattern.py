from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from temperament.parts import part


@part("rewards.pattern", modalities=("text",))
@dataclass(frozen=True)
class Pattern:
    """1 where the response matches a regular expression (a format), else 0.

    Responses beyond `longest` characters score 0 unread.
    """

    pattern: str  # regular expression; must match somewhere in the response
    whole: bool = False  # it must match the whole response
    longest: int = 4096  # characters looked at: a hostile response cannot stall the matcher for long

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as problem:
            raise ValueError(f"pattern {self.pattern!r} is no regular expression ({problem})") from None

    def score(self, prompt: Any, outputs: Sequence[str], row: Mapping[str, Any]) -> list[float | None]:
        match = re.compile(self.pattern, re.S).fullmatch if self.whole else re.compile(self.pattern, re.S).search
        return [float(len(o) <= self.longest and match(o) is not None) for o in outputs]
