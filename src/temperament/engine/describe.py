"""What the model will really see: tokens with their ids, weights and roles, and the totals of a data set, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from temperament.engine.encode import encode_all
from temperament.engine.encoded import AnyEncoded, Encoded, EncodedLabel, EncodedPair, EncodedPrompt
from temperament.engine.examples import Example


def describe(examples: Sequence[Example], tokenizer, n: int = 3, bad: Sequence[Any] = (), **options) -> dict[str, Any]:
    """`n` examples token by token, and the totals over all of them. `bad`: rows the reader left out; rows that cannot be
    encoded are added to them. options: those of `encode`. Plain JSON data:

    shown    [{"origin", "kind", "label", "sides": [{"name", "tokens": [[text, id, weight, role], ...], "trained", "cut"}]}]
    totals   {"examples", "tokens", "trained", "share", "lengths": {...}, "histogram": [[upto, count], ...], "truncated",
              "borders", "duplicates", "prompts", "bad": [{"file", "line", "reason"}]}
    special  {"eos_token": [text, id], ...}
    """
    encoded, refused = encode_all(examples, tokenizer, "skip" if len(examples) > 1 else "stop", **options)
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    return {
        "shown": [_shown(one, tokenizer) for one in encoded[:n]],
        "totals": {**totals(encoded), "bad": [_bad(b) for b in (*bad, *refused)]},
        "special": {k: [v, tokenizer.convert_tokens_to_ids(v)] for k, v in special.items()},
    }


def totals(encoded: Sequence[AnyEncoded]) -> dict[str, Any]:
    sides = [d for e in encoded for d in e.sides]
    lengths = sorted(len(d) for d in sides)
    tokens, trained = sum(lengths), sum(sum(w > 0 for w in d.weights) for d in sides)
    seen = Counter(tuple(tuple(d.ids) for d in e.sides) for e in encoded)
    at = lambda q: lengths[min(int(q * len(lengths)), len(lengths) - 1)] if lengths else 0
    return {
        "examples": len(encoded),
        "tokens": tokens,
        "trained": trained,
        "share": trained / max(tokens, 1),
        "lengths": {"shortest": at(0), "median": at(0.5), "p90": at(0.9), "longest": at(1)},
        "histogram": _histogram(lengths),
        "truncated": sum(d.cut > 0 for d in sides),
        "borders": sum(d.border for d in sides),
        "duplicates": sum(n - 1 for n in seen.values()),
        "prompts": sum(isinstance(e, EncodedPrompt) for e in encoded),
    }


def _histogram(lengths: list[int]) -> list[list[int]]:
    """[[upper bound, count], ...] over powers of two, from the first that holds something to the last."""
    bins = Counter(1 << max(n - 1, 0).bit_length() for n in lengths)
    if not bins:
        return []
    bound, out = min(bins), []
    while bound <= max(bins):
        out.append([bound, bins[bound]])
        bound *= 2
    return out


def _shown(one: AnyEncoded, tokenizer) -> dict[str, Any]:
    names = ("chosen", "rejected") if isinstance(one, EncodedPair) else ("",)
    return {
        "origin": str(one.origin),
        "kind": type(one).__name__.removeprefix("Encoded").lower() or "document",
        "label": one.label if isinstance(one, EncodedLabel) else None,
        "sides": [_side(name, d, tokenizer) for name, d in zip(names, one.sides, strict=True)],
    }


def _side(name: str, d: Encoded, tokenizer) -> dict[str, Any]:
    roles = ["template"] * len(d)
    for a, b, role in d.roles:
        roles[a:b] = [role] * (b - a)
    tokens = [[t, i, w, r] for t, i, w, r in zip(_texts(d.ids, tokenizer), d.ids, d.weights, roles, strict=True)]
    return {"name": name, "tokens": tokens, "trained": sum(w > 0 for w in d.weights), "cut": d.cut}


def _texts(ids: list[int], tokenizer) -> list[str]:
    """The characters each token adds to what stands before it. Bytes of one character that several tokens share are shown with
    the last of them; the earlier ones are empty. Put together they are the decoded text."""
    out, done, held = [], "", 0
    for t in range(len(ids)):
        # Decoding in windows from the last clean point keeps this linear: bytes and pieces join only over a few tokens.
        text = tokenizer.decode(ids[held : t + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and t - held < 8:
            out.append("")
            continue
        out.append(text[len(done) :] if text.startswith(done) else text)
        held = max(t, held)  # keep one token of context: a leading blank is written only after another token
        done = tokenizer.decode(ids[held : t + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return out


def _bad(b: Any) -> dict[str, Any]:
    origin = b.origin
    return {"file": origin.file, "line": origin.line, "reason": b.reason}
