"""Items as JSONL training rows: prompt and completion, chat turns, or a chosen and a rejected answer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from .draw import Draw
from .skill import Item, Skill

Form = Literal["prompt", "messages", "pairs"]


def wrong(item: Item, others: Iterable[Item], draw: Draw, check) -> str:
    """A plausible wrong answer: a digit changed, two words swapped, or another item's answer."""
    answer = item.answer
    spots = [i for i, c in enumerate(answer) if c.isdigit()]
    for _ in range(20):
        if spots:
            # the last digits are the result; changing an early step would leave it right
            i = spots[-1 - draw.below(min(2, len(spots)))]
            out = answer[:i] + str((int(answer[i]) + draw.between(1, 9)) % 10) + answer[i + 1 :]
        else:
            words = answer.split(" ")
            swappable = [i for i in range(len(words) - 1) if words[i] and words[i] != words[i + 1]]
            if len(words) > 2 and swappable:
                i = draw.choice(swappable)
                words[i], words[i + 1] = words[i + 1], words[i]
                out = " ".join(words)
            else:
                out = draw.choice(list(others)).answer
        if not check(item, out):
            return out
    return answer + " " + answer.strip()


def rows(skill: Skill, items: list[Item], form: Form = "prompt", seed: int = 0) -> list[dict]:
    out = []
    for item in items:
        turns = item.meta.get("messages") or [{"role": "user", "content": item.prompt}]
        if form == "messages":
            out.append({"messages": [*turns, {"role": "assistant", "content": item.answer.strip()}]})
        elif form == "pairs":
            rejected = wrong(item, items, Draw("wrong", item.id, seed), skill.check)
            out.append({"prompt": item.prompt, "chosen": item.answer, "rejected": rejected})
        else:
            out.append({"prompt": item.prompt, "completion": item.answer})
    return out


def write_jsonl(skill: Skill, path: str | Path, n: int, split: str = "train", form: Form = "prompt", seed: int = 0) -> int:
    """Write n rows (fewer where the skill is finite) and say how many."""
    made = rows(skill, skill.items(split, n, seed), form, seed)
    Path(path).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in made), encoding="utf-8")
    return len(made)
