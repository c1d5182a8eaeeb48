from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from temperament.parts import part

LOW, HIGH = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Each is its own inverse on every text: a swap of characters.
FORMS = {
    "as-is": {},
    "swapcase": str.maketrans(LOW + HIGH, HIGH + LOW),
    "rot13": str.maketrans(LOW + HIGH, LOW[13:] + LOW[:13] + HIGH[13:] + HIGH[:13]),
    "mirror": str.maketrans(LOW + HIGH, LOW[::-1] + HIGH[::-1]),
    "leetspeak": str.maketrans("aeiost431057", "431057aeiost"),
}


@part("decode.conjugate_prompt", papers=["247"], modalities=("text",))
@dataclass(frozen=True)
class ConjugatePrompt:
    """Ask in another form, and translate the answer back: output = s^-1( model( s(prompt) ) ). Nothing is trained.

    Tuning mostly shifts which task a model takes a prompt for, not what it can do: away from the tuned prompts, in a form in
    which the wanted task is still solvable, lost skills come back. Two kinds of s, one after the other: `rewrite`, the first
    pattern that matches the whole prompt is replaced by another phrasing of the same question (the answer stays as it is);
    `form`, a swap of characters, undone in the answer. What the ledger gains over the same system without it, more than the
    base does, was suppressed and not erased.
    Source: Kotha et al. 2023, Understanding Catastrophic Forgetting via Implicit Inference (paper 247).
    """

    rewrite: list[list[str]] = field(default_factory=list)  # [pattern, phrasing] pairs; \1 is the pattern's first group
    form: Literal["as-is", "swapcase", "rot13", "mirror", "leetspeak"] = "as-is"  # swap of characters

    def __post_init__(self):
        for pair in self.rewrite:
            if len(pair) != 2:
                raise ValueError(f"rewrite takes pairs of a pattern and a phrasing, not {pair!r}")
            try:
                re.sub(pair[0], pair[1], "")  # (reads the phrasing too)
            except (re.error, IndexError) as problem:
                raise ValueError(f"pattern and phrasing {pair!r} are no regular expression ({problem})") from None

    def hooks(self, base: Any) -> list[Any]:
        return []

    def ask(self, prompt: str | list[dict]) -> str | list[dict]:
        if not isinstance(prompt, str):
            return [{**m, "content": self.ask(m["content"])} if m["role"] == "user" else m for m in prompt]
        for pattern, phrasing in self.rewrite:
            if found := re.fullmatch(pattern, prompt, re.S):
                prompt = found.expand(phrasing)
                break
        return prompt.translate(FORMS[self.form])

    def tell(self, answer: str) -> str:
        return answer.translate(FORMS[self.form])

    def hear(self, output: str) -> str:
        return output.translate(FORMS[self.form])
