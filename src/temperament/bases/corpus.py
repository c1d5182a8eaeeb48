"""What a lab language model reads: documents of the worlds, weighted, as packed rows of tokens.

A row holds whole documents, each `<s> ... </s>`; attention stays inside a document (block-diagonal) and positions begin at 0 in
each. A token of an answer weighs max(1, 6 / length of the answer): retrieved values of one token, asked among worked steps of
forty, are not learned else. Prompts weigh `prompt_weight`: random digits cannot be predicted, but a base should write prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .worlds import skills
from .worlds.draw import Draw, split_of
from .worlds.text import training_text

SHORT = 6.0
Segments = list[tuple[str, bool]]  # (text, is it an answer?)


def document(name: str, draw: Draw, dense: bool = False) -> tuple[Segments, str]:
    """One training document of a skill and its end token. Nothing of the test split ever passes here."""
    skill = skills()[name]
    if dense and skill.dense is not None:
        while True:
            parts = skill.dense(draw)
            if split_of(name, *_context_key(name, parts[0][0])) == "train":
                return parts, "</s>"
    make = skill.noisy or skill.make
    assert make is not None, name
    while True:
        made = make(draw)
        if split_of(name, *made.key) == "train":
            end = "<|end|>" if "messages" in made.meta else "</s>"
            return [(made.prompt, False), (made.answer, True)], end


def _context_key(name: str, context: str) -> tuple:
    """The key `make` gives to an item with this context."""
    return (context[6:],) if name == "notes" else (context,)


class Corpus:
    """An endless, seeded stream of documents of a mixture {skill: weight}; finite skills are gone through again and again."""

    def __init__(self, mixture: dict[str, float], seed: int, dense: float = 0.5, store: Path | None = None):
        self.draw, self.dense = Draw("corpus", seed), dense
        self.names = list(mixture)
        total, edge = sum(mixture.values()), 0.0
        self.edges = []
        for name in self.names:
            edge += mixture[name] / total
            self.edges.append(edge)
        self.finite: dict[str, list[Segments]] = {}
        for name in self.names:
            skill = skills()[name]
            if name == "text":
                self.finite[name] = [[(text, True)] for text in training_text(store)]
            elif skill.finite is not None:
                self.finite[name] = [[(m.prompt, False), (m.answer, True)] for m in skill.finite("train")]
        self.order: dict[str, list[int]] = {}

    def one(self) -> tuple[Segments, str, str]:
        """(segments, end token, skill) of the next document."""
        u = self.draw.below(1 << 30) / (1 << 30)
        name = next(n for n, edge in zip(self.names, self.edges, strict=True) if u < edge or edge == self.edges[-1])
        if name in self.finite:
            if not self.order.get(name):
                self.order[name] = self.draw.shuffled(range(len(self.finite[name])))
            return self.finite[name][self.order[name].pop()], "</s>", name
        segments, end = document(name, self.draw, self.draw.chance(self.dense))
        return segments, end, name


Encoded = tuple[list[int], list[float]]
Row = tuple[list[int], list[float], list[int]]  # tokens, weights, number of the document


def encoded(corpus: Corpus, tokenizer, n: int, length: int, prompt_weight: float) -> Iterator[Encoded]:
    """n documents as (tokens, weight of predicting each token); the first token is never predicted. Too long ones are cut."""
    drawn = [corpus.one() for _ in range(n)]
    texts = [text for segments, _, _ in drawn for text, _ in segments]
    ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    bos, ends = tokenizer.bos_token_id, {e: tokenizer.convert_tokens_to_ids(e) for e in ("</s>", "<|end|>")}
    for segments, end, _ in drawn:
        tokens, weights = [bos], [0.0]
        for _, answer in segments:
            piece = next(ids)
            tokens += piece
            weights += [max(1.0, SHORT / len(piece)) if answer else prompt_weight] * len(piece)
        tokens.append(ends[end])
        weights.append(1.0)
        yield tokens[:length], weights[:length]


def packed(documents: Iterator[Encoded], length: int, open_rows: int = 12) -> Iterator[Row]:
    """Rows of at most `length` tokens from whole documents (best fit into a few open rows)."""
    rows: list[Row] = []
    for tokens, weights in documents:
        fits = [r for r in rows if len(r[0]) + len(tokens) <= length]
        if fits:
            row = max(fits, key=lambda r: len(r[0]))
        else:
            if len(rows) == open_rows:
                fullest = max(rows, key=lambda r: len(r[0]))
                rows.remove(fullest)
                yield fullest
            row = ([], [], [])
            rows.append(row)
        number = row[2][-1] + 1 if row[2] else 0
        row[0].extend(tokens)
        row[1].extend(weights)
        row[2].extend([number] * len(tokens))
    yield from rows
