"""What a world offers: items with ground truth, grouped into skills, each with an oracle that parses and never evaluates."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from .draw import Draw, split_of

Split = Literal["train", "test"]
LM = ("lm", "lm-small", "lm-large", "lm-instruct")
NOT_SMALL = ("lm", "lm-large", "lm-instruct")  # too much for the smallest
END_MARKS = re.compile(r"(</s>|<\|end\|>|<pad>).*", re.S)


@dataclass(frozen=True)
class Item:
    """One question with its answer: the model is given `prompt` and should write `answer`, then the end token."""

    id: str  # stable: "add/test/17", with another seed "add/test/s3/17"
    skill: str
    prompt: str
    answer: str
    meta: dict = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Made:
    """What a generator makes: a draft of an item. `key` decides its split; `value` is what the oracle compares."""

    key: tuple
    prompt: str
    answer: str
    value: Any = None
    meta: dict = field(default_factory=dict)


Check = Callable[[Any, str, str], bool]  # (value, answer, output) -> right


def tidy(text: str) -> str:
    """One space between words, none around, nothing after an end token."""
    return " ".join(END_MARKS.sub("", text).split())


def same_text(value: Any, answer: str, output: str) -> bool:
    return tidy(output) == tidy(answer)


def last_number(value: Any, answer: str, output: str) -> bool:
    """The last integer written is the value, however it was reached."""
    found = re.findall(r"-?\d+", tidy(output))
    return bool(found) and len(found[-1]) < 12 and int(found[-1]) == value


@dataclass(frozen=True)
class Skill:
    """A family of items of one kind.

    role   "known": bases are meant to know it; "half": a base does it some of the time (for RL); "target": no base knows it.
    metric "exact": share of items whose greedy answer passes `check`; "nll": nats a token of `answer`.
    dense  training documents that ask many questions of one context; noisy: how bases met a skill shown imperfectly.
    """

    name: str
    family: str
    make: Callable[[Draw], Made] | None = field(repr=False, default=None)
    metric: Literal["exact", "nll"] = "exact"
    verdict: Check = field(repr=False, default=same_text)
    role: Literal["known", "half", "target"] = "known"
    known_by: tuple[str, ...] = LM
    distance_to: dict[str, str] = field(default_factory=dict, hash=False, repr=False)
    finite: Callable[[str], list[Made]] | None = field(repr=False, default=None)
    dense: Callable[[Draw], list[tuple[str, bool]]] | None = field(repr=False, default=None)
    noisy: Callable[[Draw], Made] | None = field(repr=False, default=None)

    def stream(self, split: Split, seed: int = 0) -> Iterator[Made]:
        """Drafts of one split, without end (finite skills: once through), repetitions included."""
        if self.finite is not None:
            yield from Draw(self.name, split, seed, "order").shuffled(self.finite(split))
            return
        assert self.make is not None
        draw = Draw(self.name, split, seed)
        while True:
            made = self.make(draw)
            if split_of(self.name, *made.key) == split:
                yield made

    def items(self, split: Split, n: int, seed: int = 0) -> list[Item]:
        """The first n different items of a split (fewer where the skill is finite); items(n) is a prefix of items(n + 1)."""
        assert split in ("train", "test"), split
        found: dict[str, Item] = {}
        for tries, made in enumerate(self.stream(split, seed)):
            if len(found) >= n or tries > 50 * n + 1000:
                break
            same = made.prompt + made.answer
            if same not in found:
                place = f"{self.name}/{split}/{len(found)}" if seed == 0 else f"{self.name}/{split}/s{seed}/{len(found)}"
                meta = {**made.meta, "value": made.answer.strip() if made.value is None else made.value}
                found[same] = Item(place, self.name, made.prompt, made.answer, meta)
        return list(found.values())

    def check(self, item: Item, output: str) -> bool:
        """Is this output right? Parses only; also a verifier's reward."""
        assert self.metric == "exact", f"{self.name} is measured by nll"
        return bool(self.verdict(item.meta["value"], item.answer, output))

    def oracle(self, item: Item) -> str:
        """The right answer, as the model should write it."""
        return item.answer
