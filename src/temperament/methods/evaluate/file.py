from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from temperament.engine.encode import encode
from temperament.engine.examples import Chat, Completion, Preference, Prompt, Text
from temperament.engine.measure import Question, System, TextSkill, content_key, likelihood
from temperament.errors import UserError
from temperament.parts import part
from temperament.protocols import Held, Outcome


@dataclass(frozen=True)
class PreferenceSkill:
    """Is the chosen response likelier than the rejected one, per token?"""

    name: str
    rows: tuple[tuple[str, list[int], list[int], list[int], str, str], ...]
    role: str
    metric: str = "preferred"
    distance: str | None = None
    how = {}

    def key(self) -> str:
        return content_key("preference", self.name, self.rows)

    def some(self, n: int) -> PreferenceSkill:
        return PreferenceSkill(self.name, self.rows[:n], self.role)

    def measure(self, system: System) -> list[Outcome]:
        chosen = likelihood([(p, c) for _, p, c, _, _, _ in self.rows], system)
        rejected = likelihood([(p, r) for _, p, _, r, _, _ in self.rows], system)
        rows = zip(self.rows, chosen["nll"], rejected["nll"], chosen["kl"], strict=True)
        return [
            Outcome(i, self.name, system.tokenizer.decode(p), c, c if a < b else r, float(a < b), a, k)
            for (i, p, _, _, c, r), a, b, k in rows
        ]


@part("evaluate.file", modalities=("text",))
@dataclass(frozen=True)
class File:
    """Rows of a source as a skill: prompts answered greedily and compared, and the likelihood of their answers.

    prompt/completion and messages: exact match of the (last) answer, white space apart; chosen/rejected: share of pairs the
    model ranks rightly by nats per token; text: nats per token. `held_out` takes exactly those rows that the source keeps out
    of training.
    """

    data: Held  # the source whose rows are asked, e.g. {data.file: {path: test.jsonl}}
    rows: Literal["held_out", "all"] = "held_out"  # the rows it keeps out of training, or every row (a file of test rows)
    role: Literal["target", "retained"] = "target"  # what the ledger calls it
    name: str = ""  # of the skill; default: the source's name
    max_new: int = 0  # tokens an answer may have; 0: as the longest expected one
    contains: bool = False  # an answer is right when the expected one occurs in it

    def skills(self, ctx: Any) -> list[Any]:
        examples = list(self.data.held(ctx) if self.rows == "held_out" else self.data.read(ctx))[: ctx.items]
        if not examples:
            raise UserError(
                "evaluate.file.data",
                "no rows",
                "nothing is held out; raise `holdout` of the source, or give a file of test rows with rows: all",
            )
        name, tok = self.name or self.data.called, ctx.base.tokenizer
        options = {k: v for k, v in self.data.encoding(ctx.base).items() if k in ("chat_template", "ends")}
        if isinstance(examples[0], Preference):
            pairs = [encode(e, tok, **options) for e in examples]
            rows = [
                (f"{name}/{i}", *p.chosen.split, p.rejected.split[1], str(e.chosen), str(e.rejected))
                for i, (e, p) in enumerate(zip(examples, pairs, strict=True))
            ]
            return [PreferenceSkill(name, tuple(rows), self.role)]
        questions = tuple(self._question(f"{name}/{i}", e) for i, e in enumerate(examples))
        if isinstance(examples[0], Text):
            return [TextSkill(name, questions, self.role, "nll", encoding=options)]
        longest = self.max_new or max(len(tok(q.expected)["input_ids"]) for q in questions) + 4
        return [TextSkill(name, questions, self.role, "contains" if self.contains else "exact", longest, encoding=options)]

    def _question(self, id: str, example: Any) -> Question:
        if isinstance(example, Text):
            return Question(id, "", example.text, lambda output: 0.0)
        if isinstance(example, Chat):
            last = max(i for i, m in enumerate(example.messages) if m["role"] == "assistant")
            prompt, expected = example.messages[:last], example.messages[last]["content"]
        elif isinstance(example, Completion):
            prompt, expected = example.prompt, example.completion
            expected = expected if isinstance(expected, str) else expected[-1]["content"]
        elif isinstance(example, Prompt) and "answer" in example.meta:
            prompt, expected = example.prompt, str(example.meta["answer"])
        else:
            raise UserError(
                "evaluate.file.data",
                type(example).__name__.lower(),
                "these rows have no expected answer to compare with; add a column `answer` or `completion`",
            )
        want = " ".join(expected.split())
        right = (
            (lambda output: float(want in " ".join(output.split())))
            if self.contains
            else (lambda output: float(" ".join(output.split()) == want))
        )
        return Question(id, prompt, expected, right)
