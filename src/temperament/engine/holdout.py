"""Which rows are kept out of training: decided by their content, so the same rows whatever the order, and appending rows moves none."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from temperament.errors import UserError


def held_out(examples: Sequence[Any], holdout: float) -> tuple[list[Any], list[Any]]:
    """(training rows, held-out rows). holdout: a share below 1, or a number of rows. Rows with one content stay on one side; at least
    one row is trained."""
    if holdout < 0:
        raise UserError("holdout", holdout, "give a share between 0 and 1, or a number of rows")
    if holdout == 0:
        return list(examples), []
    marks = [_mark(e) for e in examples]
    if holdout < 1:
        border = int(holdout * 2**64)
    else:
        distinct = sorted(set(marks))
        border = distinct[min(int(holdout), len(distinct) - 1)]
    train = [e for e, m in zip(examples, marks, strict=True) if m >= border]
    held = [e for e, m in zip(examples, marks, strict=True) if m < border]
    if not train or not held:
        raise UserError("holdout", holdout, f"of {len(examples)} rows it leaves {len(train)} to train and {len(held)} to measure; change it")
    return train, held


def _mark(example: Any) -> int:
    """A number below 2**64 from what the example says (not where it stands)."""
    said = [(f.name, getattr(example, f.name)) for f in fields(example) if f.name not in ("origin", "meta")]
    return int.from_bytes(hashlib.sha256(repr(said).encode("utf-8", "surrogatepass")).digest()[:8], "big")
