"""Measuring what a system can do: skills of items, answered in batches, one `Outcome` an item.

A *system* is what is measured: a base with its deltas applied, the decoding parts of the recipe's `inference:` slot, and how
many rows go together. A *skill* says which items, which role (target or retained) and how an answer is scored; other modalities
bring their own class with the same `measure(system) -> list[Outcome]`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from temperament.engine.encode import encode
from temperament.engine.examples import Completion, Prompt, Text
from temperament.engine.tokens import Generated, Sampling, generate
from temperament.nn.batch import Tokens
from temperament.nn.logprobs import Reducer, Slice, best, kl, label, score
from temperament.protocols import Outcome


@dataclass
class System:
    base: Any  # bases.Base: components, tokenizer, at("base")
    inference: Sequence[Any] = ()  # decoding parts (protocols.Decode), in order
    batch: int = 64
    seed: int = 0
    graded: bool = True  # also measure what scores do not need: the likelihood of answers, the divergence from the pure base
    model: Any = None  # a View to measure instead of the live base
    folder: Path | None = None  # of the step that left it, where one did: what its source recorded lies there
    key: str = ""  # and that step's address

    @property
    def tokenizer(self):
        return self.base.tokenizer

    @property
    def subject(self):
        return self.model if self.model is not None else self.base.model

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> Generated:
        """As the system would: with the hooks of its parts, the models they bring, and the loop of one that has its own."""
        optional = lambda name: [getattr(p, name) for p in self.inference if getattr(p, name, None) is not None]
        models = {"model": self.subject} | {n: m for more in optional("models") for n, m in more(self.base).items()}
        loop = (optional("loop") or [generate])[0]
        hooks = [h for p in self.inference for h in p.hooks(self.base)]
        words = (
            {"decode": self.tokenizer.decode} if any(isinstance(s, str) for s in sampling.stops) and loop is generate else {}
        )
        return loop(models, prompts, sampling, seed=self.seed, hooks=hooks, batch=self.batch, **words)

    def paint(self, captions: list[str], ids: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, 3, H, W) in 0..1: pictures as the system makes them. ids: address of each row's noise."""
        from temperament.engine.denoise import denoise

        hooks = [h for p in self.inference for h in p.hooks(self.base)]
        sampler = next((p.sampler for p in self.inference if getattr(p, "sampler", None) is not None), None)
        ids = torch.arange(len(captions)) if ids is None else ids
        view = self.model if self.model is not None else self.base
        made = []
        for at in range(0, len(captions), self.batch):
            some = slice(at, at + self.batch)
            made.append(denoise(view, captions[some], sampler, seed=self.seed, ids=ids[some], hooks=hooks).pixels.cpu())
        return torch.cat(made) if made else torch.empty(0, 3, 0, 0)

    def asked(self, prompt: str | list) -> str | list:
        """A question in the form in which the model is asked it."""
        for p in self.inference:
            prompt = p.ask(prompt) if hasattr(p, "ask") else prompt
        return prompt

    def heard(self, output: str) -> str:
        """What the model wrote, as the system's answer."""
        for p in reversed(self.inference):
            output = p.hear(output) if hasattr(p, "hear") else output
        return output

    def told(self, answer: str) -> str:
        """What the model must write for this to be heard."""
        for p in self.inference:
            answer = p.tell(answer) if hasattr(p, "tell") else answer
        return answer


@dataclass(frozen=True)
class Question:
    """prompt: text, or messages for a chat template. check(output) -> 0..1."""

    id: str
    prompt: str | list
    expected: str
    check: Callable[[str], float] = field(repr=False, compare=False)


@dataclass(frozen=True)
class TextSkill:
    """Questions answered greedily, and the likelihood of the expected answers. distance: near, middle or far from the target.

    metric "nll" (natural text): nothing is generated, the score is nats per token, lower is better.
    """

    name: str
    questions: tuple[Question, ...]
    role: str = "retained"
    metric: str = "exact"
    max_new: int = 32
    distance: str | None = None
    encoding: dict[str, Any] = field(default_factory=dict)  # options of `encode`: a chat template of the recipe's own

    @property
    def how(self) -> dict[str, Any]:
        """How its scores read, for the ledger."""
        return {"higher_is_better": False, "bounds": None, "passes": None, "unit": "nats"} if self.metric == "nll" else {}

    def key(self) -> str:
        """What is asked, and by which chat template (the text of it): part of the address of cached scores."""
        how, template = dict(self.encoding), self.encoding.get("chat_template") or ""
        if "{" not in template and Path(template).expanduser().is_file():
            how["chat_template"] = Path(template).expanduser().read_text(encoding="utf-8")
        asked = [(q.id, q.prompt, q.expected) for q in self.questions]
        return content_key("text", self.name, self.metric, self.max_new, asked, how)

    def some(self, n: int) -> TextSkill:
        return replace(self, questions=self.questions[:n])

    def measure(self, system: System) -> list[Outcome]:
        asked, tok = self.questions, system.tokenizer
        outputs, got = [""] * len(asked), dict.fromkeys(("nll", "kl"), [None] * len(asked))
        if self.metric == "nll" or system.graded:
            # The answer is what training would train, with the token that ends it; the prompt is what a user's question
            # becomes.
            document = lambda q: (
                Text(q.expected) if q.prompt == "" else Completion(system.asked(q.prompt), said(q, system.told(q.expected)))
            )
            got = likelihood([encode(document(q), tok, **self.encoding).split for q in asked], system)
        if self.metric != "nll":
            outputs = self._answers([encode(Prompt(system.asked(q.prompt)), tok, **self.encoding).ids for q in asked], system)
        out = []
        for q, text, nll, diverged in zip(asked, outputs, got["nll"], got["kl"], strict=True):
            shown = q.prompt if isinstance(q.prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in q.prompt)
            value = nll if self.metric == "nll" else float(q.check(text))
            out.append(Outcome(q.id, self.name, shown, q.expected, text, value, nll, diverged))
        return out

    def _answers(self, prompts: list[list[int]], system: System) -> list[str]:
        # All at once (batches are the loop's): what a decoding part draws is addressed by the item, not by its place in one.
        made = system.generate(prompts, Sampling(max_new=self.max_new))
        return [system.heard(system.tokenizer.decode(ids, skip_special_tokens=True)) for ids in made.ids]


def content_key(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def said(q: Question, answer: str) -> str | list[dict]:
    """An answer in the form of its prompt: text, or a message."""
    return answer if isinstance(q.prompt, str) else [{"role": "assistant", "content": answer}]


@dataclass(frozen=True, eq=False)
class same_choice(Reducer):
    """1 where the model's first choice is the other's, else 0."""

    other: Any
    name: str = "agree"

    def __call__(self, s: Slice) -> torch.Tensor:
        return (s.logits.argmax(-1) == s.others[id(self.other)].argmax(-1)).float()


@torch.no_grad()
def likelihood(pairs: list[tuple[list[int], list[int]]], system: System, choices: bool = False) -> dict[str, list]:
    """For each (prompt, answer), over the answer's tokens: "nll" mean nats; "kl" mean KL(base || model) in nats and "agree"
    share of tokens where base and model have the same first choice (None unless the system is graded or choices are asked);
    "choice" the model's own."""
    compare = system.graded or choices
    untouched = (
        system.model is None and not system.base.originals and not system.base.hung
    )  # the pure base itself: it agrees, and KL is 0
    pure = Pure(system.base) if compare and not untouched else None
    out: dict[str, list] = {"nll": [], "kl": [], "agree": [], "choice": []}
    for start in range(0, len(pairs), system.batch):
        tokens = collate(pairs[start : start + system.batch]).to(next(system.base.model.parameters()).device)
        got = score(
            system.subject, tokens, label(), *([best(1)] if choices else []), *([kl(pure), same_choice(pure)] if pure else [])
        )
        count = tokens.weights.sum(1).clamp(min=1)
        mean = lambda v, w=tokens.weights, count=count: ((v * w).sum(1) / count).tolist()
        out["nll"] += [-v for v in mean(got["label"])]
        if choices:
            out["choice"] += [row[w > 0].tolist() for row, w in zip(got["best_ids"][..., 0], tokens.weights, strict=True)]
        nothing = [None] * len(tokens) if not compare else None
        out["agree"] += mean(got["agree"]) if pure else nothing or [1.0] * len(tokens)
        out["kl"] += [max(v, 0.0) for v in mean(got["kl"])] if pure else nothing or [0.0] * len(tokens)
    return out


@dataclass(frozen=True)
class Pure:
    """The pure base under the applied deltas, as a view."""

    base: Any

    @property
    def module(self):
        return self.base.model

    def active(self):
        return self.base.at("base")

    def __call__(self, *args, **inputs):
        with self.active() as model:
            return model(*args, **inputs)


def collate(pairs: list[tuple[list[int], list[int]]]) -> Tokens:
    """(prompt, answer) ids as right-padded Tokens; the answers carry weight 1."""
    length = max(len(p) + len(a) for p, a in pairs)
    ids = torch.zeros(len(pairs), length, dtype=torch.long)
    weights, segments = torch.zeros(len(pairs), length), torch.full((len(pairs), length), -1)
    for i, (prompt, answer) in enumerate(pairs):
        n = len(prompt) + len(answer)
        ids[i, :n] = torch.tensor(prompt + answer)
        weights[i, max(len(prompt), 1) : n] = 1.0
        segments[i, :n] = 0
    examples = torch.where(segments >= 0, torch.arange(len(pairs))[:, None], -1)
    return Tokens(ids, weights, segments, examples)
