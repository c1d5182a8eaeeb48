"""Completions of prompts and answers in a conversation, from any model, or from the system that a run ended with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from temperament.bases.load import Base
from temperament.engine.encode import encode
from temperament.engine.examples import Prompt
from temperament.engine.measure import System
from temperament.engine.tokens import Sampling
from temperament.errors import UserError
from temperament.run.reopen import subject

Messages = list[dict[str, str]]


def generate(
    model: Any,
    prompts: str | Messages | Sequence[str | Messages],
    *,
    n: int = 1,
    temperature: float | None = None,
    max_new: int = 128,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch: int = 64,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """[{"prompt", "outputs": [{"text", "tokens", "finished", "logp"}]}], one entry a prompt. A prompt is text to go on with, or
    messages to answer. temperature: default 0 (the likeliest text) for one completion, 1 for several. logp: nats, summed."""
    if n < 1:
        raise UserError("--n", n, "give at least 1")
    prompts = [prompts] if isinstance(prompts, str) or (prompts and isinstance(prompts[0], dict)) else list(prompts)
    if not prompts:
        raise UserError("prompts", prompts, "give at least one")
    base = subject(model, device)
    tokenizer = needs_tokenizer(base)
    system = System(base, base.inference, batch, seed)
    sampling = Sampling(
        max_new=max_new,
        temperature=(1.0 if n > 1 else 0.0) if temperature is None else temperature,
        top_p=top_p,
        top_k=top_k,
        stops=tuple(system.told(s) for s in stop),
    )
    for text in (m["content"] for p in prompts for m in ([{"content": p}] if isinstance(p, str) else p)):
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError("--prompt", text, "it is no UTF-8 text; give it in UTF-8")
    ids = [row for p in prompts for row in [encode(Prompt(system.asked(p)), tokenizer).ids] * n]
    most = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    for p, row in zip(prompts, ids[::n], strict=True):
        if most and len(row) >= most:
            raise UserError("--prompt", p, f"it is {len(row)} tokens long and this model reads at most {most}; shorten it")
        if not row:
            raise UserError("--prompt", p, "it has no tokens and this tokenizer no start token; give some text")
    made = system.generate(ids, sampling)
    outputs = [
        {
            "text": system.heard(tokenizer.decode(out, skip_special_tokens=True)),
            "tokens": len(out),
            "finished": why,
            "logp": float(logp.sum()),
        }
        for out, why, logp in zip(made.ids, made.finished, made.logp, strict=True)
    ]
    return [{"prompt": p, "outputs": outputs[i * n : (i + 1) * n]} for i, p in enumerate(prompts)]


def chat(model: Any, said: str, messages: Messages = (), **how: Any) -> Messages:
    """The conversation with what was said and the model's answer: give it back as `messages` to go on. how: as
    of `generate`."""
    base = subject(model, how.pop("device", "auto"))
    needs_template(base)
    told = [*messages, {"role": "user", "content": said}]
    answer = generate(base, told, **{"max_new": 256} | how)[0]["outputs"][0]["text"].strip()
    return [*told, {"role": "assistant", "content": answer}]


def as_chat(prompt: str, system: str | None = None) -> Messages:
    return ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": prompt}]


def needs_tokenizer(base: Base) -> Any:
    if base.tokenizer is None:
        raise UserError(
            "model", base.id, "it has no tokenizer, so it cannot read or write text; put its tokenizer files into the folder"
        )
    return base.tokenizer


def needs_template(base: Base) -> None:
    """Refuse to talk with a model that was never given a form of conversation."""
    if not getattr(needs_tokenizer(base), "chat_template", None):
        raise UserError(
            "model",
            base.id,
            "its tokenizer has no chat template, so it knows no conversation; let it go on with a text by `temper generate`",
        )
