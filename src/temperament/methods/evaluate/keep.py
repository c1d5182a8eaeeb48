from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from temperament.engine.measure import Pure, System, content_key, likelihood
from temperament.engine.tokens import Sampling, generate
from temperament.nn import draws
from temperament.parts import part
from temperament.protocols import Outcome

OPENERS = (
    "Hello.",
    "Explain how it works.",
    "Write a short story.",
    "What is the capital of France?",
    "Give me a list of three things.",
    "Why?",
)


@dataclass(frozen=True)
class KeepSkill:
    """Texts the base wrote itself; kept where the tuned model still makes the base's choices on them."""

    starts: tuple[tuple[int, ...], ...]
    samples: tuple[tuple[int, ...], ...]
    name: str = "keep"
    role: str = "retained"
    metric: str = "agreement"
    distance: str | None = None
    how = {"passes": None}  # graded: nothing is simply had or lost

    def key(self) -> str:
        return content_key("keep", self.starts, self.samples)

    def some(self, n: int) -> KeepSkill:
        return KeepSkill(self.starts[:n], self.samples[:n])

    def measure(self, system: System) -> list[Outcome]:
        got = likelihood([(list(p), list(a)) for p, a in zip(self.starts, self.samples, strict=True)], system, choices=True)
        show = lambda ids: system.tokenizer.decode(ids) if system.tokenizer else " ".join(map(str, ids))
        rows = zip(self.starts, self.samples, got["choice"], got["agree"], got["nll"], got["kl"], strict=True)
        return [
            Outcome(f"keep/{i}", self.name, show(p), show(a), show(c), g, n, k) for i, (p, a, c, g, n, k) in enumerate(rows)
        ]


@part("evaluate.keep", modalities=("text",))
@dataclass(frozen=True)
class Keep:
    """The automatic keep set: retention measured on any base, with no benchmark at hand.

    The base samples `items` texts at temperature 1 (from its start token, or as answers to a few plain requests when it has
    none). Measured on them, teacher-forced: agreement, the share of tokens where the tuned model's first choice is the base's;
    KL(base || tuned) in nats per token; NLL. For the base itself agreement is 1 and KL is 0. A base writes them once: they are
    kept in the user's cache, so that a run goes on with the same texts wherever it is taken up.
    """

    items: int = 64  # texts the base writes
    length: int = 48  # tokens of each, at most
    seed: int = 0  # which texts

    def skills(self, ctx: Any) -> list[KeepSkill]:
        starts = self._starts(ctx.base)
        how = Sampling(max_new=self.length, temperature=1.0)
        made = lambda: generate(Pure(ctx.base), [list(s) for s in starts], how, seed=self.seed).ids
        write = lambda: [list(map(int, ids)) for ids in made()]
        texts = ctx.constant(["keep", self.items, self.length, self.seed], write) if hasattr(ctx, "constant") else write()
        kept = [(s, tuple(ids)) for s, ids in zip(starts, texts, strict=True) if ids]
        return [KeepSkill(tuple(s for s, _ in kept), tuple(ids for _, ids in kept))]

    def _starts(self, base: Any) -> list[tuple[int, ...]]:
        tok = base.tokenizer
        if tok is not None and tok.bos_token_id is not None:
            return [(tok.bos_token_id,)] * self.items
        if tok is not None and tok.chat_template:
            ask = lambda text: tok.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=True
            )
            return [tuple(ask(OPENERS[i % len(OPENERS)])["input_ids"]) for i in range(self.items)]
        import torch

        ids = draws.randint(base.model.config.vocab_size, self.seed, "keep-start", 0, torch.arange(self.items))
        return [(int(i),) for i in ids]
