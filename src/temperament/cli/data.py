"""Show what a model will really see of a file, and which tokens carry loss.

    temper data new.jsonl --base lab/lm
    temper data chats.jsonl --base Qwen/Qwen2.5-0.5B-Instruct --mask last --n 1

Rows are rendered with the model's own chat template and tokenised as in training; trained tokens stand out, the token
that ends an answer among them. A row that cannot be used is named with its line and the reason, and stops the reading
unless --skip-bad.
"""

from __future__ import annotations

from typing import Any

from temperament.cli.app import Opt
from temperament.cli.say import Say

OPTIONS = (
    Opt("data", "JSONL, JSON, CSV, TSV or Parquet file, a folder of these, or a data set", "FILE"),
    Opt("--base", "whose tokenizer and template: lab/lm, a folder, or a Hugging Face id", "BASE"),
    Opt("--columns", "columns that the file calls otherwise, e.g. prompt=question,completion=answer", "OURS=THEIRS,..."),
    Opt("--mask", "what is trained: auto, assistant, completion, last or all", "MASK", default="auto"),
    Opt("--n", "rows shown", "N", int, 3),
    Opt("--max-length", "tokens an example may have; longer ones are refused", "N", int),
    Opt("--limit", "read only the first rows", "N", int),
    Opt("--skip-bad", "leave out rows that cannot be used, and list them"),
)


def run(a: Any, say: Say) -> dict[str, Any]:
    from temperament import api
    from temperament.cli.app import need, pairs

    need("data", a, "base")
    how = {"mask": a.mask, "max_length": a.max_length, "columns": pairs("--columns", a.columns)}
    return api.look(a.data, a.base, n=a.n, skip_bad=a.skip_bad, limit=a.limit, **how)


def show(data: dict[str, Any], say: Say, a: Any) -> None:
    from temperament.report.tokens_view import tokens_view

    say.out.print(tokens_view(data, data["notes"]))
