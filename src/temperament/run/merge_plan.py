"""What a merge will do, before anything is written: for every output tensor its sources and its method, shapes checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from temperament.delta import Delta
from temperament.delta.depth import block_of, depths
from temperament.delta.merge_run import settle, stream
from temperament.delta.stream import Source
from temperament.delta.tensorfile import Entry
from temperament.delta.views import View
from temperament.errors import UserError
from temperament.run.merge_alike import alike
from temperament.run.merge_inputs import Input
from temperament.run.vocabulary import is_vocabulary

# tensors some programs save and none reads (the masks of GPT-2's attention; its c_attn.bias is a weight)
_IGNORED = ("rotary_emb.inv_freq", "position_ids", ".attn.masked_bias", ".attn.bias")


@dataclass(frozen=True)
class Job:
    """One method on one set of names. models, base: sources in which these names are found."""

    method: Any
    models: tuple[Source, ...]
    base: Source | None
    names: tuple[str, ...]
    depth: Callable[[str], float] | None = None
    deltas: tuple[Delta, ...] | None = None  # the models as changes of the base, where all of them are


@dataclass(frozen=True)
class Plan:
    """jobs cover the output once. config: of the output; folder: whose config and other files it takes; tokenizer: a folder,
    or a tokenizer made here; dtype: of the output (None: as it is stored)."""

    jobs: tuple[Job, ...]
    inputs: tuple[Input, ...]
    config: dict[str, Any]
    folder: Path
    described: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    chat_template: str | None = None
    dtype: torch.dtype | None = None
    base: str | None = None

    def table(self) -> dict[str, Entry]:
        """{bare name: dtype and shape} of the output."""
        table = {}
        for job in self.jobs:
            first = job.base or job.models[0]
            for name in job.names:
                entry, bare = first.entry(name), name.split("/", 1)[1]
                assert bare not in table, f"{bare} is made twice"
                floating = entry.dtype.is_floating_point
                table[bare] = Entry(self.dtype if self.dtype is not None and floating else entry.dtype, entry.shape)
        return table

    def carry_out(self, writer: Any, threads: int | None = None) -> None:
        for job in self.jobs:
            if job.deltas is not None:
                settle(job.method, job.base, job.deltas, writer, job.names, threads)
                continue
            stream(job.method, job.models, job.base if job.method.needs_base else None, writer, job.names, job.depth, threads)

    def check(self) -> Plan:
        """All that can be known from headers, configs and tokenizers: which tensors, shapes, how they are read, how many."""
        for job in self.jobs:
            job.method.check(len(job.models))
            sources = [s for s in (job.base, *job.models) if s is not None]
            if job.method.needs_base and job.base is None:
                name = type(job.method).part_name
                raise UserError("base", None, f"{name} works on differences from a base; name what the models were tuned from")
            for name in job.names:
                for source in sources[1:]:
                    _same(name, sources[0], source)
        alike(self.inputs, vocabulary=self.tokenizer is None)
        return self


def _same(name: str, first: Source, other: Source) -> None:
    bare = name.split("/", 1)[1]
    if name not in other:
        raise UserError("tensor", bare, f"{first.label} has it and {other.label} has not; all must be of one architecture")
    a, b = first.entry(name), other.entry(name)
    if a.shape != b.shape:
        vocabulary = len(a.shape) == 2 and a.shape[1:] == b.shape[1:] and is_vocabulary(bare)
        why = "another vocabulary: set tokenizer_source: union or base" if vocabulary else "all must be of one architecture"
        raise UserError(f"shape of {bare}", list(b.shape), f"{other.label} differs from {first.label}, {list(a.shape)} ({why})")
    if a.dtype.is_floating_point != b.dtype.is_floating_point:
        raise UserError(f"dtype of {bare}", str(b.dtype), f"{first.label} holds {a.dtype}; convert one of them")


def aligned(source: Source, like: Source, config: Mapping[str, Any]) -> Source:
    """The source with exactly the names of `like`: a head that is tied here is its embedding; leftovers no program reads go.

    What is tied in `like` but two tensors here is refused: one tensor cannot hold both.
    """
    names, missing = {}, []
    embedding = next((n for n in source.names if n.endswith(("embed_tokens.weight", "wte.weight", "shared.weight"))), None)
    for name in like.names:
        if name in source:
            names[name] = source.aliases.get(name, name)
        elif name.endswith("lm_head.weight") and embedding and config.get("tie_word_embeddings"):
            names[name] = embedding
        else:
            missing.append(name)
    known = {*names.values(), *like.aliases}
    extra = [n for n in source.names if n not in known and not n.endswith(_IGNORED)]
    kept = [n for n in missing if not n.endswith(_IGNORED)]
    if kept:
        bare = kept[0].split("/", 1)[1]
        raise UserError("tensor", bare, f"{like.label} has it and {source.label} has not; all must be of one architecture")
    if extra:
        bare = extra[0].split("/", 1)[1]
        tied = " (there it is tied to the embedding: untie one or tie the other first)" if "lm_head" in bare else ""
        raise UserError(
            "tensor", bare, f"{source.label} has it and {like.label} has not{tied}; all must be of one architecture"
        )
    for name in [n for n in like.aliases if n in source and n not in source.aliases]:
        twin = like.aliases[name]
        if any(not torch.equal(source.block(name, *at), source.block(twin, *at)) for at in source.blocks(twin)):
            bare = name.split("/", 1)[1]
            raise UserError(
                "tied tensors",
                bare,
                f"it is one tensor with {twin.split('/', 1)[1]!r} in {like.label}, but two in {source.label}",
            )
    return View(source, {n: names[n] for n in like.names if n in names})


def simple(method: Any, models: list[Input], base: Input | None, dtype: torch.dtype | None = None) -> Plan:
    """One method for all tensors."""
    first = base or models[0]
    names = [n for n in first.source.names if not n.endswith(_IGNORED)]
    like = View(first.source, {n: n for n in names})
    like.aliases = dict(first.source.aliases)
    sources = tuple(aligned(m.source, like, m.config) for m in models)
    deltas = None if base is None else [m.change_of(base) for m in models]
    whole = deltas is None or any(d is None for d in deltas)
    job = Job(
        method, sources, None if base is None else like, tuple(names), depths(names), None if whole else tuple(deltas)
    )
    config = first.config
    inputs = tuple([*([base] if base else []), *models])
    spec = base.spec if base else None
    return Plan((job,), inputs, config, first.folder, dtype=dtype or natural(inputs), base=spec)


def natural(inputs: Iterable[Input]) -> torch.dtype | None:
    """The dtype of what is made: the widest its changes ask for; None: each tensor as it is stored."""
    asked = [i.dtype for i in inputs if i.dtype is not None]
    return max(asked, key=lambda d: d.itemsize) if asked else None


def layers_of(names: Iterable[str]) -> tuple[str, int]:
    """(prefix of the one stack of layers, how many) or UserError."""
    stacks: dict[str, int] = {}
    for name in names:
        if (at := block_of(name)) is not None:
            stacks[at[0]] = max(stacks.get(at[0], 0), at[1] + 1)
    if len(stacks) != 1:
        found = ", ".join(sorted(stacks)) or "none"
        raise UserError("slices", found, "layer slices need a model with one stack of layers")
    return next(iter(stacks.items()))
