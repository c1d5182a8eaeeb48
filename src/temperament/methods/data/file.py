from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from temperament.engine.describe import totals
from temperament.engine.encode import encode_all
from temperament.engine.encoded import AnyEncoded, EncodedLabel, EncodedPair
from temperament.engine.examples import Example, as_chat, turns_apart
from temperament.engine.rows import Rows, fingerprint, held_out, read_rows
from temperament.engine.stream import Stream
from temperament.errors import UserError
from temperament.parts import part


@part("data.file", modalities=("text",))
@dataclass(frozen=True)
class File:
    """Rows of a file, a folder or a data set: conversations, prompts with completions, texts, preferences, judged answers.

    JSONL, JSON, CSV, Parquet, `datasets` folders and hub ids; the shape is found from the columns. Each step is a pure
    function of the seed and its number. Rows that cannot be used stop the run by name unless `on_bad: skip`; a share is held
    out, decided by what a row asks, for the suites that measure the target. `temper data` shows tokens and what is trained.
    """

    yields: ClassVar = ("Tokens", "Pairs", "Labelled")

    path: str  # file, folder, name of a build step, or hub id
    name: str = ""  # how reports call it; default: the file's name
    split: str | None = None  # which split of a folder or data set
    config: str | None = None  # which configuration of a hub data set
    shape: str | None = None  # chat, completion, text, preference, ...; default: by the columns
    columns: dict[str, str] = field(default_factory=dict)  # our column -> the file's, e.g. {prompt: question}
    on_bad: Literal["stop", "skip"] = "stop"  # what to do about rows that cannot be used
    limit: int | None = None  # rows read at most
    holdout: float = 0.1  # share (below 1) or number of rows kept out of training
    mask: Literal["auto", "assistant", "completion", "last", "all"] = "auto"  # what is trained: answers, completions, or all
    chat: bool = False  # wrap prompt and completion strings as messages
    turns: Literal["together", "apart"] = "together"  # apart: each answer of a conversation is an example of its own
    chat_template: str | None = None  # instead of the tokenizer's: a file, Jinja text, or plain
    max_length: int | None = None  # tokens of an example at most; default: what the base can take
    truncate: Literal["refuse", "end", "start"] = "refuse"  # what to do about longer ones
    pack: int = 0  # tokens of a row that several examples share; 0: no packing
    count: Literal["examples", "rows"] = "examples"  # what `batch` counts when packing
    split_long: bool = False  # cut texts longer than a packed row into pieces
    shuffle: bool = True  # a new order each epoch
    last: Literal["keep", "merge"] = "keep"  # the short batch that ends an epoch: kept, or merged into the one before

    def __post_init__(self):
        if self.holdout < 0:
            raise ValueError("holdout must not be negative")
        if self.pack < 0 or self.pack == 1:
            raise ValueError("pack is the number of tokens in a row, or 0")
        if self.split_long and not self.pack:
            raise ValueError("split_long cuts texts to packed rows: give pack too")

    @property
    def called(self) -> str:
        return self.name or Path(self.path).name.partition(".")[0] or self.path

    def fingerprint(self) -> str:
        """Of the rows, and of the chat template where that is a file of its own."""
        template = self.chat_template or ""
        own = fingerprint(template) if template and "{" not in template and Path(template).expanduser().is_file() else ""
        return fingerprint(self.path) + own

    def suites(self) -> list[Any]:
        """What this source offers to be measured by: the rows it keeps out of training."""
        if not self.holdout:
            return []
        return [{"evaluate.file": {"data": self}}]

    def read(self, ctx: Any = None) -> Rows:
        made = getattr(ctx, "artefacts", None) or {}
        rows = read_rows(
            made.get(self.path, self.path), self.split, self.on_bad, self.limit, self.columns, self.shape, self.config
        )
        if rows.shape == "captioned":
            raise UserError("data.file.path", self.path, "its rows hold no text to train on; use an image source")
        return rows

    def examples(self, ctx: Any = None) -> list[Example]:
        """The rows that are not held out, as examples: what a rollout takes its prompts from."""
        return self.prepared(ctx)[0]

    def prepared(self, ctx: Any = None) -> tuple[list[Example], Rows, int]:
        """What is trained on, before encoding; the rows as read; how many of them are held out."""
        rows = self.read(ctx)
        examples, kept_out = held_out(list(rows), self.holdout)
        if self.chat:
            examples = [as_chat(e) for e in examples]
        if self.turns == "apart":
            examples = [e for whole in examples for e in turns_apart(whole)]
        return examples, rows, len(kept_out)

    def held(self, ctx: Any = None) -> list[Example]:
        """The rows kept out of training, as read: what a suite measures the target by."""
        return held_out(list(self.read(ctx)), self.holdout)[1]

    def encoding(self, base: Any) -> dict[str, Any]:
        """The options of `encode` for this base."""
        return {
            "mask": "last" if self.turns == "apart" and self.mask == "auto" else self.mask,
            "max_length": self.max_length or (None if self.split_long else _context(base.model)),
            "truncate": self.truncate,
            "chat_template": self.chat_template,
            "ends": _ends(base),
        }

    def open(self, ctx: Any) -> Stream:
        tok = ctx.base.tokenizer
        if tok is None:
            raise UserError("data.file.path", self.path, "the base has no tokenizer to read text with; give a base with one")
        examples, rows, held = self.prepared(ctx)
        if rows.shape == "prompt":
            mend = "its rows have nothing to train on; use rollout.sample, or add what should be answered"
            raise UserError("data.file.path", self.path, mend)
        encoded, refused = encode_all(examples, tok, self.on_bad, **self.encoding(ctx.base))
        stream = Stream(
            encoded, ctx.batch, ctx.seed, pack=self.pack, count=self.count, shuffle=self.shuffle, last=self.last,
            split=self.split_long, name=self.called, pad=tok.pad_token_id or 0,
        )  # fmt: skip
        stream.yields = (_kind(encoded[0]),)
        fill = stream.fill()
        ctx.tell(
            "data", name=self.called, shape=rows.shape, notes=list(rows.notes), left_out=len(rows.bad) + len(refused),
            bad=[f"{b.origin}: {b.reason}" for b in (*rows.bad, *refused)][:20], held_out=held,
            fill=fill.rate if fill else None, **totals(encoded),
        )  # fmt: skip
        return stream


def _kind(one: AnyEncoded) -> str:
    return "Pairs" if isinstance(one, EncodedPair) else "Labelled" if isinstance(one, EncodedLabel) else "Tokens"


def _context(model: Any) -> int | None:
    """Positions this model can take, where its config says so."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return limit if isinstance(limit, int) and limit > 1 else None


def _ends(base: Any) -> tuple[str, ...]:
    """The tokens this base stops at: its generation config may name more than the tokenizer's eos."""
    ids = getattr(getattr(base.model, "generation_config", None), "eos_token_id", None)
    ids = ids if isinstance(ids, list) else [ids]
    return tuple(t for t in base.tokenizer.convert_ids_to_tokens([i for i in ids if i is not None]) if t)
