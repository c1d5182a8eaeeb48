"""What shapes do not tell: models that read equal tensors differently. Checked before a merge, of configs and tokenizers.

    architecture    model_type
    heads           how many a layer has, and how wide: the same matrix is cut otherwise
    rope            its base and its scaling: the same queries are turned otherwise
    vocabulary      a token under another number, a number that is another token (tokens added later apart)

What one config says and the other leaves out is taken as equal: programs write their defaults or do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from temperament.errors import UserError
from temperament.run.merge_inputs import Input

KEYS = ("model_type", "num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "n_head_kv", "head_dim")
Words = tuple[dict[str, int], set[str]]  # number of every token; the tokens that were added later
ROPE = ("rope_theta", "rotary_emb_base", "partial_rotary_factor", "rotary_pct")


def alike(inputs: Iterable[Input], vocabulary: bool = True) -> None:
    """UserError names the folder, the key and both values. vocabulary: must a row be the same token in all of them?"""
    known: dict[Path, Input] = {}
    for model in inputs:
        known.setdefault(model.folder.resolve(), model)
    first, *others = known.values()
    told = dict(_told(first.config))
    for other in others:
        for key, value in _told(other.config):
            if key in told and told[key] != value:
                mend = f"{first.spec} has {told[key]!r}, so equal tensors mean other things; merge models of one architecture"
                raise UserError(f"{key} of {other.spec}", value, mend)
    if not vocabulary:
        return
    words = _words(first.folder)
    for other in others:
        if words is not None and not _same_file(first.folder, other.folder) and (theirs := _words(other.folder)) is not None:
            _one_vocabulary(first.spec, words, other.spec, theirs)


def _told(config: Mapping[str, Any], under: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of what decides how tensors are used; of nested configs by their name."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope if isinstance(rope, Mapping) else {}
    flat = {**{k: config.get(k) for k in (*KEYS, *ROPE)}, **{k: v for k, v in rope.items() if not isinstance(v, Mapping)}}
    if "type" in flat:  # as it was called before
        flat["rope_type"] = flat.pop("type")
    if "rope_theta" in config or rope:
        flat.setdefault("rope_type", "default")
    for key, value in flat.items():
        if value is not None:
            yield under + key, value
    for key, value in rope.items():  # one a kind of layer
        if isinstance(value, Mapping):
            yield from _told({"rope_parameters": value}, f"{under}{key}.")
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config"):
            yield from _told(value, f"{under}{key}.")


def _same_file(one: Path, other: Path) -> bool:
    files = [folder / "tokenizer.json" for folder in (one, other)]
    return all(f.is_file() for f in files) and files[0].read_bytes() == files[1].read_bytes()


def _words(folder: Path) -> Words | None:
    """None where there is no tokenizer that can be read."""
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab.*")):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception:  # what can not be read says nothing; whoever needs it tells
        return None
    return tokenizer.get_vocab(), {*tokenizer.get_added_vocab()}


def _one_vocabulary(one: str, ours: Words, other: str, theirs: Words) -> None:
    mend = "merge models of one vocabulary, or set tokenizer_source in a merge file"
    for token, at in sorted(ours[0].items(), key=lambda item: item[1]):
        if theirs[0].get(token, at) != at:
            raise UserError(f"vocabulary of {other}: number of token {token!r}", theirs[0][token], f"{one} has {at}; {mend}")
    added, named = ours[1] | theirs[1], {at: token for token, at in theirs[0].items()}
    for token, at in sorted(ours[0].items(), key=lambda item: item[1]):
        if token not in added and named.get(at, token) != token and named[at] not in added:
            raise UserError(f"vocabulary of {other}: token {at}", named[at], f"{one} has {token!r}; {mend}")
