"""Conversations rendered by a chat template, and the characters of them a model would have had to write itself.

    the trained words of turn i = what follows  render(messages[:i], generation prompt)  in  render(messages[:i+1]),
                                  up to and including the first end-of-turn token

That is by construction what the model is asked for at inference: the answer, the white space the template puts before it, the
token that ends the turn - and nothing after that. The same characters must stand in the rendering of the whole conversation;
a template that writes earlier turns differently later (dropping their thinking, say) is refused, not guessed at. A template
with `{% generation %}` markers says itself what is trained; a marker that stops short of the end-of-turn token is extended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from temperament.engine.examples import Example
from temperament.errors import Unusable, UserError

PLAIN = (
    "{{ bos_token if bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}Assistant:"
    "{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['role'] | capitalize }}: {{ message['content'] }}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
BUILT_IN = {"plain": PLAIN}
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SENTINEL = "Zq7sentinelq7Z"
TEMPLATE_MEND = "use a tokenizer that has one, give chat_template: a file or text, or chat_template: plain"


UNLIKE_ITS_PROMPT = "writes {} otherwise than its own generation prompt begins it, so what the model must write is not certain"
NO_END = "writes no end token after {}, so a model would never learn to stop there"
REWRITTEN = "writes {} differently once the conversation goes on, so the words trained would not be those the model sees"


class BadExample(Unusable):
    """An example that cannot be encoded. Names its row; sources collect these when told to skip."""

    def __init__(self, example: Example, reason: str, mend: str = "mend the row, or say on_bad: skip"):
        self.origin, self.reason = example.origin, reason
        super().__init__(str(example.origin), f"a {type(example).__name__.lower()} that cannot be used", f"{reason}; {mend}")


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a text, and the weight of the loss on them."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class Rendered:
    text: str
    spans: tuple[Span, ...]
    roles: tuple[tuple[int, int, str], ...]  # (start, end, role) of the messages' own words, in order; the rest is template
    open_end: bool = False  # the template writes no end token after the last answer: the caller appends eos


def resolve_template(tokenizer, chat_template: str | None, tools=None) -> str:
    """The Jinja text: of the tokenizer, of a name in BUILT_IN, of a file, or as given."""
    if chat_template in BUILT_IN:
        if not tokenizer.eos_token:
            raise UserError("chat_template", chat_template, "the tokenizer has no eos_token that could end a turn; name one")
        return BUILT_IN[chat_template]
    if chat_template and "{" not in chat_template:
        path = Path(chat_template).expanduser()
        if not path.is_file():
            known = ", ".join(BUILT_IN)
            raise UserError("chat_template", chat_template, f"no such file; give a .jinja file, Jinja text, or one of: {known}")
        return path.read_text(encoding="utf-8")
    if chat_template:
        return chat_template
    if not tokenizer.chat_template:
        raise UserError("chat_template", "not set", f"the rows are conversations and the tokenizer has none; {TEMPLATE_MEND}")
    return tokenizer.get_chat_template(None, tools)


class Template:
    """One chat template with one tokenizer. `ends`: further end-of-turn tokens, e.g. those of the generation config."""

    def __init__(self, tokenizer, source: str, ends: Sequence[str] = ()):
        self.tokenizer, self.source = tokenizer, source
        self.marked = bool(_MARKER.search(source))
        added = tokenizer.added_tokens_decoder.values()
        special = {*tokenizer.all_special_tokens, *(str(t) for t in added if t.special)} - {tokenizer.unk_token}
        self._control = _any_of(special)  # what no message may contain
        self._tokens = _any_of(special | {str(t) for t in added})
        self.parts = False  # does it want content as a list of parts, as templates of vision-language models do?
        stops = [e for e in (tokenizer.eos_token, *ends) if e]
        run, self.tail = self._probe(stops)
        self.end = "".join(run) or None  # what the template ends a turn with
        self.ends = tuple(dict.fromkeys([*([self.end, run[0]] if run else ()), *stops]))

    def _probe(self, stops: list[str]) -> tuple[list[str], str]:
        """(the tokens the template ends a turn with, all it writes after the words of an answer): adjacent tokens, up to the
        first at which generation stops."""
        for self.parts in (False, True):
            try:
                text, _ = self._render([{"role": "user", "content": "hello"}, {"role": "assistant", "content": _SENTINEL}])
            except Exception:  # what it dislikes is said of each row that it refuses
                continue
            if _SENTINEL in text:
                break
        else:
            self.parts = False
            return [], ""
        tail = text.rpartition(_SENTINEL)[2]
        run, found = [], self._tokens.search(tail)
        while found and not (run and run[-1] in stops):
            run.append(found.group())
            found = self._tokens.match(tail, found.end())
        return run or [t for t in [tail.strip()] if t], tail

    def _render(self, messages, tools=None, options=None, generate=False):
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        texts, spans = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=self.source,
            add_generation_prompt=generate,
            return_assistant_tokens_mask=self.marked and not generate,
            **{**self.tokenizer.special_tokens_map, **(options or {})},
        )
        return texts[0], (spans[0] if spans else [])

    def render(self, example: Example, messages: list[dict], generate: bool = False) -> tuple[str, list]:
        """(text, marked spans). A template that refuses the messages makes a BadExample with the template's own words."""
        from jinja2 import TemplateError

        try:
            return self._render(messages, example.tools, example.options, generate)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, RecursionError) as e:
            why = str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
            raise BadExample(example, f"the chat template refuses the conversation ({why})") from None

    # ---- the trained characters -------------------------------------------------------------------------------------------

    def conversation(self, example: Example, messages: list[dict], trained: Sequence[int]) -> Rendered:
        """The whole conversation, with spans for the messages numbered in `trained` (all of the assistant)."""
        weights = {i: float(messages[i].get("weight", 1)) for i in trained}
        trained = [i for i in trained if weights[i] > 0]
        messages = self.plain_messages(example, messages)
        text, marked = self.render(example, messages)
        open_end = False
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        marked = [(a, b) for a, b in marked if b > a]
        if self.marked and (len(marked) == len(turns) or trained == turns):
            ranges = self._from_markers(example, messages, turns, trained, text, marked)
        else:  # no marks, or more of them than answers of which only some are wanted
            ranges, text, open_end = self._from_prefixes(example, messages, trained, text)
        spans = tuple(Span(a, b, weights[i]) for i, a, b in ranges)
        return Rendered(text, spans, self._roles(messages, text), open_end)

    def whole(self, example: Example, messages: list[dict]) -> Rendered:
        """The whole conversation, all of it trained."""
        messages = self.plain_messages(example, messages)
        text, _ = self.render(example, messages)
        open_end = self.end is None and messages[-1]["role"] == "assistant"
        text = text.removesuffix(self.tail) if open_end else text
        return Rendered(text, (Span(0, len(text)),), self._roles(messages, text), open_end)

    def prompt(self, example: Example, messages: list[dict]) -> Rendered:
        """The messages and the header of the answer to come."""
        messages = self.plain_messages(example, messages)
        text, _ = self.render(example, messages, generate=True)
        return Rendered(text, (), self._roles(messages, text))

    def _from_prefixes(self, example, messages, trained, text):
        refuse = lambda i, why, mend: BadExample(example, f"the chat template {why.format(f'message {i + 1}')}", mend)
        ranges, open_end = [], False
        for i in trained:
            last = i == len(messages) - 1
            if i == 0:
                raise BadExample(example, "the conversation starts with an answer, so nothing shows where it begins")
            before, _ = self.render(example, messages[:i], generate=True)
            after = text if last else self.render(example, messages[: i + 1])[0]
            if not after.startswith(before):
                raise refuse(i, UNLIKE_ITS_PROMPT, "give a chat_template: with {% generation %} markers")
            turn, start = after[len(before) :], len(before)
            stops = [(turn.find(e), -len(e)) for e in self.ends if e in turn]
            said = len(after.removesuffix(self.tail))
            if stops:
                end = start + min(stops)[0] - min(stops)[1]
            elif not last and self.end is None and (stop := next((e for e in self.ends if text.startswith(e, said)), None)):
                after, end = text, said + len(stop)  # the header of the next turn is where generation stops (GLM)
            elif last and self.end is None:
                # What the template adds after an answer is white space: cut off, and eos takes its place.
                text, end, open_end = after[:said], said, True
            else:
                raise refuse(i, NO_END, "say mask: last, or let the template write {{ eos_token }}")
            if not text.startswith(after[:end]):
                raise refuse(i, REWRITTEN, "say mask: last or turns: apart, or give a chat_template: with markers")
            self._check_kept(example, messages[i], i, text[start:end])
            ranges.append((i, start, end))
        return ranges, text, open_end

    def _from_markers(self, example, messages, turns, trained, text, marked):
        if not marked:
            raise BadExample(example, "the chat template marks nothing of this conversation as generated")
        one_each = len(marked) == len(turns)
        owners = turns if one_each else [trained[-1]] * len(marked)
        ranges = [(i, a, self._with_end(text, a, b)) for i, (a, b) in zip(owners, marked, strict=True) if i in trained]
        for i in trained:
            written = "".join(text[a:b] for owner, a, b in ranges if owner == i or not one_each)
            self._check_kept(example, messages[i], i, written)
        return ranges

    def _with_end(self, text: str, a: int, b: int) -> int:
        """Where a marked span [a, b) ends once the end of the turn is part of it."""
        whole = tuple(e for e in self.ends if e == self.end or not (self.end or "").startswith(e))
        if text[a:b].rstrip().endswith(whole):
            return b
        blank = len(text[b:]) - len(text[b:].lstrip())
        for e in self.ends:
            if text.startswith(e, b + blank):
                return b + blank + len(e)
            for inside in range(1, min(len(e), b - a)):  # the mark may stop between two tokens of the end
                if text.startswith(e, b - inside):
                    return b - inside + len(e)
        return b

    def _check_kept(self, example, message, i, written):
        squeeze = lambda s: re.sub(r"\s+", "", s)
        said = squeeze(written)
        for name in ("content", "thinking", "reasoning_content"):
            if squeeze(message.get(name) or "") not in said:
                raise BadExample(example, f"the chat template leaves out part of the {name} of message {i + 1}",
                                 "use a template that writes it, or take it out of the row")  # fmt: skip
        for call in message.get("tool_calls") or ():
            name = (call.get("function") or call).get("name")
            if isinstance(name, str) and squeeze(name) not in said:
                raise BadExample(example, f"the chat template leaves out the tool call of message {i + 1}",
                                 "use a template that writes tool calls")  # fmt: skip

    # ---- messages ---------------------------------------------------------------------------------------------------------

    def plain_messages(self, example: Example, messages: list[dict]) -> list[dict]:
        """As templates of language models want them: content a string, arguments of tool calls objects, no loss weights.
        Control tokens inside the words of a message would change roles or end turns: refused."""
        out = []
        for i, message in enumerate(messages):
            m = {k: v for k, v in message.items() if k != "weight"}
            if isinstance(m["content"], list):
                other = next((p["type"] for p in m["content"] if p["type"] != "text"), None)
                if other:
                    raise BadExample(example, f"message {i + 1} holds a part of type '{other}', and this base reads only text",
                                     "use a base of that modality, or say on_bad: skip")  # fmt: skip
                m["content"] = "".join(p["text"] for p in m["content"])
            found = self._control.search(m["content"])
            if found:
                why = f"message {i + 1} ({m['role']}) holds the control token {found.group()!r} as text"
                raise BadExample(example, why, "take it out (a rendered conversation belongs in text), or say on_bad: skip")
            if m.get("tool_calls"):
                m["tool_calls"] = [_call(c) for c in m["tool_calls"]]
            out.append(m)
        return out

    def _roles(self, messages, text) -> tuple:
        """Where the words of each message stand, as far as they stand verbatim; only for display."""
        at, found = 0, []
        for m in messages:
            words = m["content"].strip()
            start = text.find(words, at) if words else -1
            if start >= 0:
                at = start + len(words)
                found.append((start, at, m["role"]))
        return tuple(found)


def _any_of(strings: set[str]) -> re.Pattern:
    longest_first = sorted(strings, key=lambda s: (-len(s), s))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _call(call: dict) -> dict:
    """OpenAI sends arguments as JSON text; a template that writes them with `tojson` would quote that a second time."""
    inner = call.get("function")
    target = dict(inner) if isinstance(inner, dict) else dict(call)
    if isinstance(target.get("arguments"), str):
        try:
            parsed = json.loads(target["arguments"])
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            target["arguments"] = parsed
    return {**call, "function": target} if isinstance(inner, dict) else target
