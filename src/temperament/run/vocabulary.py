"""One vocabulary for models that have several: the rows of embeddings and heads moved, lent and averaged before a merge.

    union    the base's tokens, then those of the others;   base, or a model: that one's tokens

A token a model lacks takes, in that model, the row of the one model that has it; of the base where several have it; else their
mean. `tokens` may name another source: a model, {kind: zero}, {kind: model_token, model, token or token_id}; force: also where
a model has the token itself. Rows beyond the tokens (padding) are the mean of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from temperament.delta.stream import Source
from temperament.delta.tensorfile import Entry
from temperament.delta.views import View
from temperament.errors import UserError
from temperament.run.merge_inputs import Input
from temperament.run.mergekit_check import spec_of

Rows = list[tuple[int, int]]  # (model, row) whose mean a row is; none: zero


def is_vocabulary(name: str) -> bool:
    """Has this tensor a row a token?"""
    ends = (
        "embed_tokens.weight",
        "wte.weight",
        "word_embeddings.weight",
        "lm_head.weight",
        "shared.weight",
        "embed_in.weight",
        "embed_out.weight",
    )
    return name.endswith(ends)


@dataclass
class Vocabulary:
    """inputs and the token -> id of each; out: the tokenizer made, or None where nothing changes."""

    inputs: list[Input]
    known: list[dict[str, int]] = field(default_factory=list)
    out: Any = None
    size: int = 0
    base: int | None = None
    tokens: Mapping[str, Any] = field(default_factory=dict)
    folder: Any = None

    @classmethod
    def of(cls, document: Mapping[str, Any], base: Input | None, inputs: list[Input]) -> Vocabulary:
        """From a merge file's tokenizer_source or tokenizer, whose keys and types were checked."""
        given = document.get("tokenizer") or {}
        source = (given.get("source") or "union") if given else document.get("tokenizer_source")
        if source is None:
            return cls(inputs)
        made = cls(inputs, base=inputs.index(base) if base is not None else None, tokens=given.get("tokens") or {})
        made._build(source, given.get("pad_to_multiple_of"))
        return made

    def _build(self, source: Any, multiple: int | None) -> None:
        loaded = [tokenizer_of(i) for i in self.inputs]
        sizes = [_rows(i) for i in self.inputs]
        self.known = [{t: r for t, r in tok.get_vocab().items() if r < n} for tok, n in zip(loaded, sizes, strict=True)]
        first = self.base or 0
        if source in ("union", "base"):
            at = first
        else:
            at = next((k for k, i in enumerate(self.inputs) if i.spec == source), None)
            if at is None:
                raise UserError(
                    "tokenizer_source", source, f"union, base, or one of the models: {', '.join(i.spec for i in self.inputs)}"
                )
        self.folder, self.out = self.inputs[at].folder, tokenizer_of(self.inputs[at])
        if source == "union":
            for vocabulary, tokenizer in zip(self.known, loaded, strict=True):
                have, added = self.out.get_vocab(), {str(t): t for t in tokenizer.added_tokens_decoder.values()}
                new = [added.get(t, t) for t, _ in sorted(vocabulary.items(), key=lambda item: item[1]) if t not in have]
                if new:
                    self.out.add_tokens(new)
        have = self.out.get_vocab()
        self.out.add_tokens([t for t in self.tokens if t not in have])
        final = self.out.get_vocab()
        self.size = max(max(final.values()) + 1, len(final))
        if multiple:
            self.size = -(-self.size // multiple) * multiple
        self.rows = [self._plan(m, final) for m in range(len(self.inputs))]
        if all(
            n == self.size and rows == [[(m, r)] for r in range(n)]
            for m, (n, rows) in enumerate(zip(sizes, self.rows, strict=True))
        ):
            self.rows = None  # every model has this vocabulary already

    def _plan(self, model: int, final: Mapping[str, int]) -> list[Rows | None]:
        """For every new row of a model where it comes from; None: padding, the mean of all."""
        rows: list[Rows | None] = [None] * self.size
        for token, at in final.items():
            given = self.tokens.get(token)
            if token in self.known[model] and not (given or {}).get("force"):
                rows[at] = [(model, self.known[model][token])]
                continue
            rows[at] = self._given(token, given) if given and given.get("source") is not None else self._lent(token)
        return rows

    def _lent(self, token: str) -> Rows:
        have = [(m, known[token]) for m, known in enumerate(self.known) if token in known]
        if len(have) > 1 and self.base is not None and token in self.known[self.base]:
            return [(self.base, self.known[self.base][token])]
        return have

    def _given(self, token: str, given: Mapping[str, Any]) -> Rows:
        source = given["source"]
        if isinstance(source, Mapping) and "kind" in source:
            if source["kind"] == "zero":
                return []
            name, row, wanted = source["model"], source.get("token_id"), source.get("token")
        else:
            name, row, wanted = source, None, token
        name = spec_of(name, f"tokenizer.tokens.{token}")
        at = next((k for k, i in enumerate(self.inputs) if i.spec == name), None)
        row = row if row is not None or at is None else self.known[at].get(wanted)
        if at is None or row is None or row >= _rows(self.inputs[at]):
            raise UserError(f"tokenizer.tokens.{token}", source, "name a model of this merge that has the token")
        return [(at, row)]

    # -- what a plan uses ---------------------------------------------------------------------------------------------------

    def view(self, model: Input) -> Source:
        """The source of a model with its vocabulary tensors in the new order."""
        if self.out is None or self.rows is None:
            return model.source
        at, made = self.inputs.index(model), {}
        for name in model.source.names:
            if is_vocabulary(name):
                entry = model.source.entry(name)
                made[name] = (Entry(entry.dtype, (self.size, *entry.shape[1:])), lambda name=name: self._moved(at, name))
        view = View(model.source, made=made)
        return view

    def _moved(self, model: int, name: str) -> Tensor:
        own = self.inputs[model].source.read(name)
        out = torch.zeros(self.size, *own.shape[1:], dtype=torch.float32)
        plan = self.rows[model]
        direct = [(at, r[0][1]) for at, r in enumerate(plan) if r is not None and len(r) == 1 and r[0][0] == model]
        at, rows = (torch.tensor(v) for v in zip(*direct, strict=True))
        out[at] = own[rows].float()
        others: dict[int, Tensor] = {model: own}
        done = {int(a) for a in at}
        for new, sources in enumerate(plan):
            if sources is None or new in done or not sources:
                continue
            for m, _ in sources:
                if m not in others:
                    others[m] = self.inputs[m].source.read(name)
            out[new] = sum(others[m][r].float() for m, r in sources) / len(sources)
        padding = [new for new, sources in enumerate(plan) if sources is None]
        if padding:
            filled = torch.tensor([new for new, sources in enumerate(plan) if sources is not None])
            out[torch.tensor(padding)] = out[filled].mean(0)
        return out.to(own.dtype)

    def tokenizer(self) -> Any:
        return self.out

    def resized(self, config: dict[str, Any]) -> dict[str, Any]:
        return config | {"vocab_size": self.size} if self.out is not None else config


def tokenizer_of(model: Input, field: str = "tokenizer_source") -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.folder, local_files_only=True)
    except Exception as problem:
        why = str(problem).strip().split("\n")[0][:120]
        raise UserError(field, model.spec, f"its tokenizer could not be read ({why})") from None


def _rows(model: Input) -> int:
    name = next((n for n in model.source.names if is_vocabulary(n)), None)
    if name is None:
        raise UserError("tokenizer_source", model.spec, "no embedding was found in it by name; leave tokenizer_source out")
    return model.source.entry(name).shape[0]
