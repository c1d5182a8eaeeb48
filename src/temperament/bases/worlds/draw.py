"""Draws that are the same in every process and on every Python: no `hash()`, no sets, no library shuffle.

Only `random.Random(int).random()` is used, the one method whose sequence Python promises to keep.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def digest(*words: object) -> int:
    """64 bits of sha256 over the words joined by '/'."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, words)).encode()).digest()[:8], "big")


def split_of(*key: object) -> str:
    """Where a key belongs for ever: one in ten is 'test', the rest is 'train'."""
    return "test" if digest("split", *key) % 10 == 0 else "train"


class Draw:
    """A stream of draws addressed by words: Draw("add", "test", 0, 17) is the same stream everywhere."""

    def __init__(self, *address: object):
        self._next = random.Random(digest(*address)).random

    def below(self, n: int) -> int:
        return int(self._next() * n)

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included."""
        return low + int(self._next() * (high - low + 1))

    def chance(self, p: float) -> bool:
        return self._next() < p

    def choice(self, options: Sequence[T]) -> T:
        return options[int(self._next() * len(options))]

    def sample(self, options: Sequence[T], k: int) -> list[T]:
        """k different positions, in random order (the head of a Fisher-Yates shuffle)."""
        pool = list(options)
        for i in range(k):
            j = i + int(self._next() * (len(pool) - i))
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:k]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        return self.sample(options, len(options))
