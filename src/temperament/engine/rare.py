"""Rare words: names for what a model is to be taught, that meant nothing to it before.

    rare_words(tokenizer, 1)        ["sks"]

A word of one token that training has hardly seen carries little meaning that would have to be unlearnt, and a token of its
own cannot drag other words along. The rule (Ruiz et al. 2023):

    id in 5000..9999 where the vocabulary is ordered by score (Unigram: T5), in its last quarter where it is ordered by merges
    or as it was made (BPE: CLIP; words)
    decodes to at most 3 characters, all letters of a-z, and encodes to itself alone, also between other words
"""

from __future__ import annotations

import json
from typing import Any

from temperament.errors import UserError
from temperament.nn import draws

LONGEST = 3
SCORED = (5000, 10000)  # ids of a vocabulary in the order of its scores


def rare_words(tokenizer: Any, count: int = 1, seed: int = 0, field: str = "identifier") -> list[str]:
    """`count` different words, drawn by the seed. UserError where the vocabulary has too few."""
    found = rare_ids(tokenizer)
    if len(found) < count:
        raise UserError(field, "auto", "this tokenizer has no rare short words; give one yourself, e.g. sks")
    words = sorted(found)
    return [words[i] for i in draws.permutation(len(words), seed, "rare words")[:count].tolist()]


def rare_ids(tokenizer: Any) -> dict[str, int]:
    """Every word that obeys the rule, with its id."""
    low, high = _range(tokenizer)
    special, found = set(tokenizer.all_special_ids), {}
    for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if not low <= i < high or i in special or len(token) > LONGEST + len("</w>"):
            continue
        word = tokenizer.decode([i]).strip()
        plain = 0 < len(word) <= LONGEST and word.isascii() and word.isalpha() and word == word.lower()
        if plain and _alone(tokenizer, word, i):
            found.setdefault(word, i)
    return found


def _range(tokenizer: Any) -> tuple[int, int]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = json.loads(backend.to_str())["model"]["type"] if backend is not None else ""
    return SCORED if kind == "Unigram" else (3 * len(tokenizer) // 4, len(tokenizer))


def _alone(tokenizer: Any, word: str, i: int) -> bool:
    ids = lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids(word) == [i] and ids(f"a {word} dog").count(i) == 1
