from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from temperament.engine.examples import Chat, Completion, Preference, Text
from temperament.engine.measure import Question, System, TextSkill, content_key, likelihood
from temperament.engine.rows import held_out, read_rows
from temperament.errors import UserError
from temperament.parts import part
from temperament.protocols import Outcome


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
        return [Outcome(i, self.name, system.tokenizer.decode(p), c, c if a < b else r, float(a < b), a, k) for (i, p, _, _, c, r), a, b, k in rows]


@part("evaluate.file", modalities=("text",))
@dataclass(frozen=True)
class File:
    """Rows of a file as a skill: prompts answered greedily and compared, and the likelihood of their answers.

    prompt/completion and messages: exact match of the (last) answer, white space apart; chosen/rejected: share of pairs the model
    ranks rightly by nats per token; text: nats per token. `rows: held_out` takes exactly those rows that `data.file` with the same
    `holdout` leaves out of training.
    """

    path: str  # file, folder or data set
    role: Literal["target", "retained"] = "target"  # what the ledger calls it
    name: str = ""  # of the skill; default: the file's name
    rows: Literal["held_out", "all"] = "held_out"  # which rows
    holdout: float = 0.1  # share (below 1) or number of rows kept out of training
    max_new: int = 0  # tokens an answer may have; 0: as the longest expected one
    contains: bool = False  # an answer is right when the expected one occurs in it

    def skills(self, ctx: Any) -> list[Any]:
        examples = list(read_rows(self.path))
        if self.rows == "held_out":
            examples = held_out(examples, self.holdout)[1]
        if not examples:
            raise UserError("evaluate.file.holdout", self.holdout, f"no row of {self.path} is held out; raise it, or give a file of test rows with rows: all")
        examples, name, tok = examples[: ctx.items], self.name or self.path.rstrip("/").rsplit("/", 1)[-1].rsplit(".", 1)[0], ctx.base.tokenizer
        if isinstance(examples[0], Preference):
            from temperament.engine.encode import encode

            rows = []
            for i, e in enumerate(examples):
                pair = encode(e, tok)
                cut = next(k for k, w in enumerate(pair.chosen.weights) if w > 0)
                rows.append((f"{name}/{i}", pair.chosen.ids[:cut], pair.chosen.ids[cut:], pair.rejected.ids[cut:], str(e.chosen), str(e.rejected)))
            return [PreferenceSkill(name, tuple(rows), self.role)]
        questions = tuple(self._question(f"{name}/{i}", e) for i, e in enumerate(examples))
        if isinstance(examples[0], Text):
            return [TextSkill(name, questions, self.role, "nll")]
        longest = self.max_new or max(len(tok(q.expected)["input_ids"]) for q in questions) + 4
        return [TextSkill(name, questions, self.role, "contains" if self.contains else "exact", longest)]

    def _question(self, id: str, example: Any) -> Question:
        if isinstance(example, Text):
            return Question(id, "", example.text, lambda output: 0.0)
        if isinstance(example, Chat):
            last = max(i for i, m in enumerate(example.messages) if m["role"] == "assistant")
            prompt, expected = example.messages[:last], example.messages[last]["content"]
        elif isinstance(example, Completion):
            prompt, expected = example.prompt, example.completion
            expected = expected if isinstance(expected, str) else expected[-1]["content"]
        else:
            raise UserError("evaluate.file.path", self.path, f"rows of the kind {type(example).__name__.lower()!r} have no expected answer to compare with")
        want = " ".join(expected.split())
        right = (lambda output: float(want in " ".join(output.split()))) if self.contains else (lambda output: float(" ".join(output.split()) == want))
        return Question(id, prompt, expected, right)
