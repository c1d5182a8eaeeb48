"""What one row of data means: eleven shapes, and how the columns of a row become one.

    tokenised    input_ids [+ labels | completion_mask | assistant_masks]        Tokenised
    preference   chosen + rejected [+ prompt | conversations | instruction]      Preference
    stepwise     prompt + completions + labels                                   Stepwise
    judged       prompt + completion + label, or messages + label (true/false)   Judged
    completion   prompt + completion                                             Completion
    chat         messages                                                        Chat
    sharegpt     conversations, of from/value or of role/content [+ system]      Chat
    alpaca       instruction + output [+ input, system, history]                 Chat
    captioned    image or file_name, + text or label                             Captioned
    text         text                                                            Text
    prompt       prompt, and whatever a reward wants to see                      Prompt

The names are those of the ecosystem. A row that does not fit raises `Unfit(reason)`; nothing is repaired by guessing. Columns
that the shape does not use stay in `meta` (rewards read them). Every example remembers the file and line it came from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from temperament.errors import nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip


class Unfit(Exception):
    """This row cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Origin:
    """Where a row stands. `line` counts from 1; in files without lines (Parquet, datasets) it is the row's number."""

    file: str
    line: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.line}"


NOWHERE = Origin("memory", 0, "row")


@dataclass(frozen=True, kw_only=True)
class Example:
    origin: Origin = NOWHERE
    meta: dict = field(default_factory=dict)  # columns the shape does not use
    tools: list | None = None  # JSON schemas, given to the chat template
    images: tuple = ()
    options: dict = field(default_factory=dict)  # chat_template_kwargs of this row


@dataclass(frozen=True)
class Text(Example):
    text: str


@dataclass(frozen=True)
class Chat(Example):
    messages: list[dict]


@dataclass(frozen=True)
class Completion(Example):
    prompt: str | list[dict]
    completion: str | list[dict]


@dataclass(frozen=True)
class Preference(Example):
    prompt: str | list[dict]
    chosen: str | list[dict]
    rejected: str | list[dict]


@dataclass(frozen=True)
class Judged(Example):
    prompt: str | list[dict]
    completion: str | list[dict]
    label: bool


@dataclass(frozen=True)
class Stepwise(Example):
    prompt: str
    completions: list[str]
    labels: list[bool]


@dataclass(frozen=True)
class Prompt(Example):
    prompt: str | list[dict]


@dataclass(frozen=True)
class Captioned(Example):
    image: Any  # a path, or what `datasets` decoded
    text: str
    label: str = ""  # its class, where it has one


@dataclass(frozen=True)
class Tokenised(Example):
    ids: list[int]
    weights: list[float]


def as_chat(example: Example) -> Example:
    """Strings become one user and one assistant message, so that a chat template applies to them."""
    say = lambda role, v: [{"role": role, "content": v}] if isinstance(v, str) else v
    new = {}
    if hasattr(example, "prompt") and not isinstance(example, Stepwise):
        new["prompt"] = say("user", example.prompt)
    for name in ("completion", "chosen", "rejected"):
        if hasattr(example, name):
            new[name] = say("assistant", getattr(example, name))
    return replace(example, **new)


def turns_apart(example: Example) -> list[Example]:
    """A conversation as one conversation for each of its answers, ending there: to be trained with mask="last". What a chat
    template needs that writes earlier turns differently (without their thinking) once the conversation has gone on."""
    if not isinstance(example, Chat):
        return [example]
    ends = [i + 1 for i, m in enumerate(example.messages) if m["role"] == "assistant" and m.get("weight", 1) > 0]
    return [replace(example, messages=example.messages[:n]) for n in ends if n > 1]


def question(example: Example) -> str:
    """What is asked, as one string: two rows with equal questions must not stand on both sides of a split."""
    if isinstance(example, Chat):
        last = max((i for i, m in enumerate(example.messages) if m["role"] == "assistant"), default=len(example.messages))
        asked = example.messages[:last]
    elif isinstance(example, Tokenised):
        asked = example.ids
    elif isinstance(example, Captioned) and example.label and isinstance(example.image, str):
        asked = "/".join(Path(example.image).parts[-2:])  # a picture of a class is its own question
    elif isinstance(example, Text | Captioned):
        asked = example.text
    else:
        asked = example.prompt
    return asked if isinstance(asked, str) else json.dumps(asked, sort_keys=True, ensure_ascii=False, default=str)


# ---- values -----------------------------------------------------------------------------------------------------------------


def _string(row: Mapping, name: str, *, empty: bool = False) -> str:
    value = row.get(name)
    if value is None:
        raise Unfit(f"column '{name}' is missing")
    if not isinstance(value, str):
        raise Unfit(f"column '{name}' holds {_kind(value)}, not text")
    if not empty and not value.strip():
        raise Unfit(f"column '{name}' is empty")
    return _encodable(value, f"column '{name}'")


def _encodable(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        code = ord(text[e.start])
        what = f"byte 0x{code - 0xDC00:02x}, which is not UTF-8" if 0xDC80 <= code <= 0xDCFF else "half of a surrogate pair"
        raise Unfit(f"{where} holds {what} (character {e.start + 1})") from None
    return text


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true/false"
    names = {"int": "a number", "float": "a number", "str": "text", "list": "a list", "tuple": "a list", "dict": "an object",
             "NoneType": "nothing"}  # fmt: skip
    return names.get(type(value).__name__, f"a {type(value).__name__}")


def _bool(value: object, name: str) -> bool:
    if isinstance(value, bool):
        return value
    if value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "0", "1"):
        return value.strip().lower() in ("true", "1")
    raise Unfit(f"'{name}' is {value!r}, not true or false")


def _parsed(value: object, name: str) -> object:
    """Lists travel through CSV and old Parquet files as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise Unfit(f"column '{name}' starts like JSON and is not") from None
    return value


def _message(raw: object, where: str) -> dict:
    """One checked message: {"role", "content", ...}; keys that are null (struct columns are filled with them) are dropped."""
    if not isinstance(raw, Mapping):
        raise Unfit(f"{where} is {_kind(raw)}, not an object with role and content")
    message = {k: v for k, v in raw.items() if v is not None}
    if "role" not in message and "from" in message:
        raise Unfit(f"{where} has from/value instead of role/content: that is sharegpt, call the column 'conversations'")
    role = message.get("role")
    if role not in ROLES:
        raise Unfit(f"{where} has the unknown role {role!r}: {nearest(str(role), ROLES)}")
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        content = message["content"] = [_part(p, where) for p in content]
        blank = not content or all(p["type"] == "text" and not p["text"].strip() for p in content)
    elif isinstance(content, str):
        blank = not _encodable(content, where).strip()
    elif content is None:
        blank = True
        message["content"] = ""
    else:
        raise Unfit(f"{where} ({role}) has {_kind(content)} as content, not text")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, (list, tuple)) and all(isinstance(c, Mapping) for c in calls)):
        raise Unfit(f"{where} ({role}): tool_calls is not a list of objects")
    # A tool may answer nothing, and an empty system message says "no system prompt" to templates that have a default one.
    if blank and not (role in ("tool", "system", "developer") or (role == "assistant" and calls)):
        raise Unfit(f"{where} ({role}) is empty")
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise Unfit(f"{where} ({role}): weight is {weight!r}, not a number from 0 on")
    return message


def _part(part: object, where: str) -> dict:
    if isinstance(part, str):
        return {"type": "text", "text": _encodable(part, where)}
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise Unfit(f"{where} has a content part without a type")
    part = {k: v for k, v in part.items() if v is not None}
    if part["type"] == "text":
        if not isinstance(part.get("text"), str):
            raise Unfit(f"{where} has a text part without text")
        _encodable(part["text"], where)
    return part


def _messages(value: object, name: str, *, least: int = 1) -> list[dict]:
    value = _parsed(value, name)
    if value is None:
        raise Unfit(f"column '{name}' is missing")
    if not isinstance(value, (list, tuple)):
        raise Unfit(f"column '{name}' holds {_kind(value)}, not a list of messages")
    if len(value) < least:
        raise Unfit(f"column '{name}' has no messages")
    return [_message(m, f"message {i + 1} of '{name}'") for i, m in enumerate(value)]


def _ends_with_assistant(messages: list[dict], name: str) -> list[dict]:
    if messages[-1]["role"] != "assistant":
        raise Unfit(f"the last message of '{name}' is from {messages[-1]['role']}, not from the assistant")
    return messages


def _awaits_answer(messages: list[dict], name: str) -> list[dict]:
    if messages[-1]["role"] == "assistant":
        raise Unfit(f"the last message of '{name}' is already an answer of the assistant")
    return messages


def _side(row: Mapping, name: str) -> str | list[dict]:
    """A string or a list of messages (or one sharegpt message)."""
    value = row.get(name)
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, (list, tuple)):
        if any(isinstance(m, Mapping) and "from" in m and "role" not in m for m in value):
            value = [_from_sharegpt(m, i, name) for i, m in enumerate(value)]
        return _messages(value, name)
    return _string(row, name)


# ---- shapes -----------------------------------------------------------------------------------------------------------------


def _text(row):
    return Text(_string(row, "text"))


def _captioned(row):
    image = row.get("image", row.get("file_name"))
    if image is None:
        raise Unfit("column 'image' is missing")
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        raise Unfit(f"column 'label' is {_kind(label)}, not the name or number of a class")
    label = "" if label is None else str(label).strip()
    return Captioned(image, _string(row, "text") if "text" in row or not label else label, label)


def _chat(row):
    return Chat(_ends_with_assistant(_messages(row.get("messages"), "messages"), "messages"))


def _from_sharegpt(m: object, i: int, name: str) -> dict:
    where = f"message {i + 1} of '{name}'"
    if not isinstance(m, Mapping):
        raise Unfit(f"{where} is {_kind(m)}, not an object with from and value")
    if m.get("role") is not None:
        return _message(m, where)
    speaker, value = m.get("from"), m.get("value")
    if speaker not in SHAREGPT:
        raise Unfit(f"{where} is from {speaker!r}: {nearest(str(speaker), SHAREGPT)}")
    if speaker == "function_call":
        try:
            calls = json.loads(value) if isinstance(value, str) else value
            calls = calls if isinstance(calls, list) else [calls]
            calls = [{"type": "function", "function": {"name": c["name"], "arguments": c.get("arguments", {})}} for c in calls]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise Unfit(f"{where} is a function_call and its value is not JSON with a name and arguments") from None
        return _message({"role": "assistant", "content": "", "tool_calls": calls}, where)
    return _message({"role": SHAREGPT[speaker], "content": value, "weight": m.get("weight")}, where)


def _system(row) -> list[dict]:
    text = row.get("system")
    if text is None or (isinstance(text, str) and not text.strip()):
        return []
    return [{"role": "system", "content": _string(row, "system")}]


def _conversations(row, *, least=1) -> list[dict]:
    turns = _parsed(row.get("conversations"), "conversations")
    if turns is None:
        raise Unfit("column 'conversations' is missing")
    if not isinstance(turns, (list, tuple)) or len(turns) < least:
        raise Unfit("column 'conversations' is not a list of messages, or is empty")
    return _system(row) + [_from_sharegpt(m, i, "conversations") for i, m in enumerate(turns)]


def _sharegpt(row):
    return Chat(_ends_with_assistant(_conversations(row), "conversations"))


def _instruction(row) -> list[dict]:
    text = _string(row, "instruction")
    more = row.get("input")
    if more is not None and not isinstance(more, str):
        raise Unfit(f"column 'input' holds {_kind(more)}, not text")
    history = _parsed(row.get("history"), "history") or []
    turns = []
    for pair in history:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(p, str) and p.strip() for p in pair)):
            raise Unfit("column 'history' is not a list of [question, answer]")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    text = f"{text}\n{_encodable(more, 'input')}" if more and more.strip() else text
    return [*_system(row), *turns, {"role": "user", "content": text}]


def _alpaca(row):
    return Chat([*_instruction(row), {"role": "assistant", "content": _string(row, "output")}])


def _prompt_value(row):
    value = _side(row, "prompt")
    return _awaits_answer(value, "prompt") if isinstance(value, list) else value


def _alike(prompt, name: str, *sides):
    """Prompt and responses of one kind: strings with strings, messages with messages (a string becomes one message)."""
    if all(isinstance(s, str) for s in (prompt, *sides)):
        return prompt, *sides
    say = lambda role, v: [{"role": role, "content": v}] if isinstance(v, str) else v
    sides = [_ends_with_assistant(say("assistant", s), name) for s in sides]
    return say("user", prompt), *sides


def _completion(row):
    prompt, completion = _alike(_prompt_value(row), "completion", _side(row, "completion"))
    return Completion(prompt, completion)


def _judged(row):
    if row.get("messages") is not None and row.get("prompt") is None:
        messages = _chat(row).messages
        prompt, completion = _awaits_answer(messages[:-1], "messages") if len(messages) > 1 else [], messages[-1:]
        if not prompt:
            raise Unfit("'messages' has an answer and no question")
    else:
        prompt, completion = _alike(_prompt_value(row), "completion", _side(row, "completion"))
    if row.get("label") is None:
        raise Unfit("column 'label' is missing")
    return Judged(prompt, completion, _bool(row["label"], "label"))


def _common(a, b) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def _implicit_prompt(chosen, rejected):
    """The common beginning. Strings are cut at the last 'Assistant:' of it, else at its last word, so that no response loses
    the words that both happen to begin with in the middle of one."""
    n = _common(chosen, rejected)
    if isinstance(chosen, str):
        common = chosen[:n]
        turn = max((m.end() for m in re.finditer(r"(?:^|\n)(?:Assistant|assistant|AI|ASSISTANT):", common)), default=0)
        n = turn or max((m.start() for m in re.finditer(r"\s+\S*$", common)), default=0)
    else:
        while n and chosen[n - 1]["role"] == "assistant":
            n -= 1
    if n == 0:
        raise Unfit("there is no prompt: neither a column 'prompt' nor a common beginning of chosen and rejected")
    if n >= min(len(chosen), len(rejected)):
        raise Unfit("chosen or rejected is empty after their common beginning")
    return chosen[:n], chosen[n:], rejected[n:]


def _preference(row):
    chosen, rejected = _side(row, "chosen"), _side(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise Unfit("one of chosen and rejected is text and the other a list of messages")
    if chosen == rejected:
        raise Unfit("chosen and rejected are equal")
    if row.get("conversations") is not None:
        prompt = _awaits_answer(_conversations(row), "conversations")
    elif row.get("instruction") is not None and row.get("prompt") is None:
        prompt = _instruction(row)
    elif row.get("prompt") is not None:
        prompt = _side(row, "prompt")
    else:
        prompt = None
    if prompt is not None and isinstance(chosen, list):  # many sets repeat the prompt inside both conversations
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        n = len(asked)
        if chosen[:n] == asked == rejected[:n]:
            prompt, chosen, rejected = asked, chosen[n:], rejected[n:]
        elif chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
            prompt = None  # what is inside both counts; the column is often only its last question
    if prompt is None:
        prompt, chosen, rejected = _implicit_prompt(chosen, rejected)
    if isinstance(prompt, list):
        _awaits_answer(prompt, "prompt")
    prompt, chosen, rejected = _alike(prompt, "chosen' or 'rejected", chosen, rejected)
    if not chosen or not rejected:
        raise Unfit("chosen or rejected is empty after the prompt")
    return Preference(prompt, chosen, rejected)


def _stepwise(row):
    steps, labels = _parsed(row.get("completions"), "completions"), _parsed(row.get("labels"), "labels")
    if not isinstance(steps, (list, tuple)) or not steps or not all(isinstance(s, str) and s.strip() for s in steps):
        raise Unfit("column 'completions' is not a list of texts")
    if not isinstance(labels, (list, tuple)) or len(labels) != len(steps):
        raise Unfit(f"column 'labels' does not hold one label for each of the {len(steps)} completions")
    return Stepwise(_string(row, "prompt"), [_encodable(s, "completions") for s in steps], [_bool(v, "labels") for v in labels])


def _prompt(row):
    return Prompt(_prompt_value(row))


def _tokenised(row):
    ids = row.get("input_ids")
    if not isinstance(ids, (list, tuple)) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise Unfit("column 'input_ids' is not a list of token ids")
    weights = [1.0] * len(ids)
    for name in ("labels", "completion_mask", "assistant_masks", "attention_mask"):
        mask = row.get(name)
        if mask is None:
            continue
        if not isinstance(mask, (list, tuple)) or len(mask) != len(ids):
            raise Unfit(f"column '{name}' does not have the {len(ids)} entries of 'input_ids'")
        if name == "labels":
            if any(m not in (-100, i) for m, i in zip(mask, ids, strict=True)):
                raise Unfit("column 'labels' holds ids that are neither -100 nor those of 'input_ids' (are they shifted?)")
            mask = [m != -100 for m in mask]
        weights = [w * bool(m) for w, m in zip(weights, mask, strict=True)]
    return Tokenised(list(ids), weights)


@dataclass(frozen=True)
class Shape:
    """`needs`: columns of which each (a tuple: one of them) must be there; `takes`: columns used when there."""

    needs: tuple
    takes: tuple
    build: Callable[[Mapping], Example]

    def fits(self, columns: Iterable[str]) -> bool:
        columns = set(columns)
        return all(bool(columns.intersection(n)) if isinstance(n, tuple) else n in columns for n in self.needs)


SHAPES: dict[str, Shape] = {  # the first that fits is taken
    "tokenised": Shape(("input_ids",), ("labels", "completion_mask", "assistant_masks", "attention_mask"), _tokenised),
    "preference": Shape(("chosen", "rejected"), ("prompt", "conversations", "instruction", "input", "system", "history"),
                        _preference),
    "stepwise": Shape(("prompt", "completions", "labels"), (), _stepwise),
    "judged": Shape(("prompt", "completion", "label"), (), _judged),
    "completion": Shape(("prompt", "completion"), (), _completion),
    "chat": Shape(("messages",), (), _chat),
    "sharegpt": Shape(("conversations",), ("system",), _sharegpt),
    "alpaca": Shape(("instruction", "output"), ("input", "system", "history"), _alpaca),
    "captioned": Shape((("image", "file_name"), ("text", "label")), (), _captioned),
    "text": Shape(("text",), (), _text),
    "prompt": Shape(("prompt",), (), _prompt),
}  # fmt: skip
COMMON = ("tools", "images", "chat_template_kwargs")  # read in every shape
COLUMNS = tuple(dict.fromkeys(
    c for s in SHAPES.values() for n in (*s.needs, *s.takes, *COMMON, "label") for c in (n if isinstance(n, tuple) else (n,))
))  # fmt: skip


def to_example(row: Mapping, shape: str, origin: Origin) -> Example:
    """The example a row holds. Raises `Unfit` with the reason. Columns that are null count as absent."""
    row = {k: v for k, v in row.items() if v is not None}
    s = SHAPES[shape]
    example = s.build(row)
    used = {c for n in (*s.needs, *s.takes) for c in (n if isinstance(n, tuple) else (n,))} | set(COMMON)
    if shape == "judged":
        used |= {"messages"} if "prompt" not in row else set()
    tools = _parsed(row.get("tools"), "tools")
    if tools in ("", [], ()):
        tools = None
    if tools is not None and not (isinstance(tools, (list, tuple)) and all(isinstance(t, Mapping) for t in tools)):
        raise Unfit("column 'tools' is not a list of JSON schemas")
    options = _parsed(row.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    if not isinstance(options, Mapping):
        raise Unfit("column 'chat_template_kwargs' is not an object")
    images = row.get("images", ())
    images = tuple(images) if isinstance(images, (list, tuple)) else (images,)
    if "image" in row and shape != "captioned":
        images, used = (*images, row["image"]), used | {"image"}
    meta = {k: v for k, v in row.items() if k not in used}
    tools = list(tools) if tools else None
    return replace(example, origin=origin, meta=meta, tools=tools, images=images, options=dict(options))
