"""Natural English: paragraphs of the docstrings of Python's standard library.

Their text changes with the Python version, so what is measured is frozen in `text_test.txt` (modules no base was trained on)
and `text_train.txt` (a part of the training text, for replay), one paragraph a line. Training itself reads the live
library, and the docstrings of numpy and torch, without any module or paragraph of the test.
`python -m temperament.bases.worlds.text` wrote the two files (Python 3.11).
The text is from the Python documentation, (c) Python Software Foundation, PSF licence.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import sysconfig
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from .draw import Draw, digest
from .skill import Made, Skill

HERE = Path(__file__).parent
SKIPPED = ("site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "turtledemo", "pydoc_data", "ensurepip")


def _paragraphs(docstring: str):
    for block in re.split(r"\n\s*\n", docstring):
        text = " ".join(block.split())
        plain = sum(c.isalpha() or c in " .,'" for c in text)
        if text.isascii() and 60 <= len(text) <= 360 and plain > 0.93 * len(text) and ">>>" not in text and "---" not in text:
            yield text


def read(root: str) -> dict[str, str]:
    """Paragraph -> module path, each paragraph once, in the order of the files under a folder."""
    found: dict[str, str] = {}
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in SKIPPED)
        for name in sorted(f for f in files if f.endswith(".py")):
            path = os.path.join(folder, name)
            try:
                with open(path, encoding="utf-8") as file:
                    tree = ast.parse(file.read())
            except (SyntaxError, UnicodeDecodeError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    for text in _paragraphs(ast.get_docstring(node) or ""):
                        found.setdefault(text, os.path.relpath(path, root).replace(os.sep, "/"))
    return found


@cache
def library() -> dict[str, str]:
    """The standard library of the running Python."""
    return read(sysconfig.get_paths()["stdlib"])


def held_out(module: str) -> bool:
    return digest("text", module) % 10 == 0


@cache
def frozen(split: str) -> tuple[str, ...]:
    return tuple((HERE / f"text_{split}.txt").read_text(encoding="utf-8").splitlines())


@cache
def training_text(store: Path | None = None) -> tuple[str, ...]:
    """Everything a base may read: the library without the held-out modules, numpy and torch; no held-out paragraph.

    Reading thousands of files takes a minute; with `store` it is done once.
    """
    if store is not None and store.exists():
        return tuple(json.loads(store.read_text(encoding="utf-8")))
    found = {text: None for text, module in library().items() if not held_out(module)}
    for package in ("numpy", "torch"):
        spec = find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            found.update(dict.fromkeys(read(place)))
    kept = dict.fromkeys(frozen("test"))
    texts = tuple(text for text in found if text not in kept)
    if store is not None:
        store.parent.mkdir(parents=True, exist_ok=True)
        store.write_text(json.dumps(texts), encoding="utf-8")
    return texts


def paragraphs(split: str) -> list[Made]:
    """The prompt is the first three words, the answer the rest of the paragraph; nll is over the answer."""
    out = []
    for text in frozen(split):
        words = text.split(" ")
        out.append(Made((text,), " ".join(words[:3]), " " + " ".join(words[3:]), text))
    return out


class NGrams:
    """A baseline for text: interpolated n-gram model over token ids, with Witten-Bell smoothing down to the uniform.

    p(w | h) = (c(h w) + t(h) p(w | shorter h)) / (c(h) + t(h));   t(h): kinds of token seen after h
    """

    def __init__(self, rows: list[list[int]], vocabulary: int, order: int = 3):
        self.order, self.vocabulary = order, vocabulary
        self.after: dict[tuple[int, ...], Counter] = {}
        for row in rows:
            for i in range(len(row)):
                for n in range(min(i, order - 1) + 1):
                    self.after.setdefault(tuple(row[i - n : i]), Counter())[row[i]] += 1
        self.totals = {h: sum(c.values()) for h, c in self.after.items()}

    def probability(self, token: int, history: tuple[int, ...]) -> float:
        p = 1.0 / self.vocabulary
        for n in range(len(history) + 1):
            seen = self.after.get(history[len(history) - n :])
            if seen is None:
                break
            kinds, total = len(seen), self.totals[history[len(history) - n :]]
            p = (seen[token] + kinds * p) / (total + kinds)
        return p

    def nll(self, row: list[int], start: int = 1) -> tuple[float, int]:
        """Sum of nats and count over row[start:]."""
        total = 0.0
        for i in range(start, len(row)):
            total -= math.log(self.probability(row[i], tuple(row[max(0, i - self.order + 1) : i])))
        return total, len(row) - start


SKILLS = (Skill("text", "text", finite=paragraphs, metric="nll"),)


def freeze(test_bytes: int = 70_000, train_bytes: int = 90_000) -> None:
    for split, size in (("test", test_bytes), ("train", train_bytes)):
        pool = [text for text, module in library().items() if held_out(module) == (split == "test")]
        kept, used = [], 0
        for text in Draw("freeze", split).shuffled(pool):
            if used + len(text) + 1 <= size:
                kept.append(text)
                used += len(text) + 1
        (HERE / f"text_{split}.txt").write_text("\n".join(kept) + "\n", encoding="utf-8")


if __name__ == "__main__":
    freeze()
