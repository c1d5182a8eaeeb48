"""A second turn: the same model is shown its first answer and answers once more.

    again = Again(tokenizer, "\\n{prompt}", "There might be an error ...")
    again.prompt(asked, answered)         ids of the first turn -> ids of the prompt of the second

By tokens, so that the first answer stands there exactly as it was sampled, less what ended it:

    plain text   asked, answered, text                  {prompt} in the text is the question once more, without its BOS
    messages     asked, answered, its end, instruction of a user, header of an answer: as the chat template writes them

Which of the two is seen by the prompt: one that ends in the template's header of an answer is a conversation. The text around
{prompt} is tokenised by itself: where words are joined to the blank before them, end it in a new line, not in a blank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from temperament.engine.chat import Template, resolve_template
from temperament.engine.examples import Prompt
from temperament.errors import UserError

TEXT = "\n{prompt}"
INSTRUCTION = "There might be an error in the solution above. Please correct it, if there is one, and write the final solution."
ASKED, SAID = "a question", "an answer"


class Again:
    def __init__(self, tokenizer: Any, text: str = TEXT, instruction: str = INSTRUCTION):
        self.tokenizer = tokenizer
        plain = lambda words: list(tokenizer(words, add_special_tokens=False)["input_ids"]) if words else []
        self.pieces = [plain(words) for words in text.split("{prompt}")]
        self.header, self.bridge = self._messages(plain, instruction) if tokenizer.chat_template else ([], [])

    def _messages(self, plain: Any, instruction: str) -> tuple[list[int], list[int]]:
        """What follows a question, and what follows an answer up to the next one, in a conversation."""
        turn = lambda role, content: {"role": role, "content": content}
        first, then = [turn("user", ASKED)], [turn("assistant", SAID), turn("user", instruction)]
        template = Template(self.tokenizer, resolve_template(self.tokenizer, None))
        texts = [template.prompt(Prompt(m), m).text for m in (first, [*first, *then])]
        if not (texts[0].count(ASKED) == 1 == texts[1].count(SAID)):
            mend = "it rewrites what was said, so a second turn cannot follow the first; use a base of plain text"
            raise UserError("tokenizer.chat_template", self.tokenizer.name_or_path, mend)
        return plain(texts[0].split(ASKED)[1]), plain(texts[1].split(SAID)[1])

    def prompt(self, asked: Sequence[int], answered: Sequence[int], ends: Sequence[int] = ()) -> list[int]:
        """ends: ids that end an answer; those at the end of this one are taken away."""
        asked, answered = list(asked), list(answered)
        while answered and answered[-1] in ends:
            answered.pop()
        if self.header and asked[-len(self.header) :] == self.header:
            return [*asked, *answered, *self.bridge]
        question = asked[1:] if asked[:1] == [self.tokenizer.bos_token_id] else asked
        out = [*asked, *answered, *self.pieces[0]]
        for piece in self.pieces[1:]:
            out += [*question, *piece]
        return out
