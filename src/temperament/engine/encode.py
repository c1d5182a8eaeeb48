"""Examples to token ids with a loss weight on each: the one place where it is decided what is trained.

    mask         Text                Chat                         Completion, Judged, Preference
    auto         everything          every answer                 the response
    assistant    -                   every answer                 every answer, those in the prompt too (messages only)
    last         -                   the last answer              the last answer (messages only)
    completion   -                   -                            the response
    all          everything          everything                   everything (not for Judged and Preference)

Rules that hold for each of them: weights[t] is the weight of *predicting* token t, so the first token of a document has none;
the token that ends an answer is trained with it, whatever the padding token is; a text gets eos once, also when it has one
already; a beginning-of-sequence token is there once or not at all; prompt and response are tokenised together, and a token
that straddles their border belongs to the response. Nothing is cut off unless asked; an example with nothing to train is an
error. Strings are plain text; to wrap them as messages is asked for with `examples.as_chat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Literal
from weakref import WeakKeyDictionary

from temperament.engine.chat import BadExample, Rendered, Span, Template, resolve_template
from temperament.engine.encoded import AnyEncoded, Encoded, EncodedLabel, EncodedPair, EncodedPrompt, numbered
from temperament.engine.examples import Chat, Completion, Example, Judged, Preference, Prompt, Stepwise, Text, Tokenised
from temperament.errors import UserError, nearest

MASKS = ("auto", "assistant", "completion", "all", "last")
TRUNCATE = ("refuse", "end", "start")


def encode(
    example: Example,
    tokenizer,
    *,
    mask: Literal["auto", "assistant", "completion", "all", "last"] = "auto",
    max_length: int | None = None,
    truncate: Literal["refuse", "end", "start"] = "refuse",
    chat_template: str | None = None,
    ends: Sequence[str] = (),
) -> AnyEncoded:
    """What the model will see of one example. `chat_template` replaces the tokenizer's (see `chat.resolve_template`); `ends`
    are further tokens that end a turn. Raises `BadExample`, naming the row, or `UserError` where no row could be encoded."""
    if mask not in MASKS:
        raise UserError("mask", mask, nearest(mask, MASKS))
    if truncate not in TRUNCATE:
        raise UserError("truncate", truncate, nearest(truncate, TRUNCATE))
    if max_length is not None and max_length < 2:
        raise UserError("max_length", max_length, "a document needs at least two tokens, one of them to be predicted")
    if example.images:
        raise BadExample(example, "it holds images, and this base reads only text", "use a base of that modality")
    do = _Encode(example, tokenizer, mask, chat_template, tuple(ends))
    return do.run(max_length, truncate)


def encode_all(examples: Sequence[Example], tokenizer, on_bad: Literal["stop", "skip"] = "stop", **options):
    """(encoded, bad): all that can be encoded (or was), numbered from 0, and the `BadExample`s, which stop unless
    on_bad="skip"."""
    if tokenizer is None and not all(isinstance(e, Encoded) for e in examples):
        mend = "this base has no tokenizer, so it reads no texts; use rows it can learn from, or a language model"
        raise UserError("train.source", "texts", mend)
    done, bad = [], []
    for example in examples:
        try:
            one = example if isinstance(example, Encoded) else encode(example, tokenizer, **options)
        except BadExample as e:
            if on_bad == "stop":
                raise
            bad.append(e)
            continue
        done.append(numbered(one, len(done)))
    if bad and not done:
        raise bad[0]
    return done, bad


_templates: WeakKeyDictionary = WeakKeyDictionary()  # tokenizer -> {(template text, special tokens, ends): Template}


@dataclass
class _Encode:
    example: Example
    tokenizer: object
    mask: str
    chat_template: str | None
    ends: tuple[str, ...]

    def run(self, max_length, truncate) -> AnyEncoded:
        e = self.example
        fit = lambda *sides: _fit(e, sides, max_length, truncate, self.tokenizer)
        if isinstance(e, Tokenised):
            self._allow("auto")
            return self._checked(*fit(Encoded(list(e.ids), list(e.weights), (), e.origin, e.meta)))
        if isinstance(e, Text):
            self._allow("auto", "all")
            return self._checked(*fit(self._joined("", e.text)))
        if isinstance(e, Chat):
            self._allow("auto", "assistant", "last", "all")
            return self._checked(*fit(self._conversation(e.messages, 0)))
        if isinstance(e, Completion):
            self._allow(*(("auto", "completion", "all") if isinstance(e.prompt, str) else MASKS))
            return self._checked(*fit(self._response(e.prompt, e.completion)))
        if isinstance(e, Judged):
            self._allow("auto", "completion")
            return EncodedLabel(self._checked(*fit(self._response(e.prompt, e.completion))), e.label)
        if isinstance(e, Preference):
            self._allow("auto", "completion")
            pair = fit(self._response(e.prompt, e.chosen), self._response(e.prompt, e.rejected))
            chosen, rejected = (self._checked(side) for side in pair)
            if chosen.ids == rejected.ids:
                raise BadExample(e, "chosen and rejected are the same tokens")
            return EncodedPair(chosen, rejected)
        if isinstance(e, Stepwise):
            self._allow("auto", "completion")
            return self._checked(*fit(self._steps(e)))
        if isinstance(e, Prompt):
            self._allow("auto", "completion", "assistant", "last")
            (one,) = fit(self._prompt(e))
            return one
        raise BadExample(e, f"a {type(e).__name__.lower()} is not made of text", "use a base of that modality")

    def _allow(self, *masks: str) -> None:
        if self.mask not in masks:
            what = type(self.example).__name__.lower()
            raise UserError("mask", self.mask, f"for rows of the kind '{what}' it can be {', '.join(masks)}")

    # ---- the kinds --------------------------------------------------------------------------------------------------------

    def _response(self, prompt, response) -> Encoded:
        if isinstance(prompt, str):
            return self._joined(prompt, response)
        return self._conversation([*prompt, *response], len(prompt))

    def _joined(self, prompt: str, response: str) -> Encoded:
        """Plain text: [bos] prompt response eos."""
        spans = (Span(0 if self.mask == "all" else len(prompt), len(prompt) + len(response)),)
        roles = ((0, len(prompt), "prompt"), (len(prompt), len(prompt) + len(response), "completion" if prompt else "text"))
        return _ended(self._begun(self._tokenised(Rendered(prompt + response, spans, roles))), self._eos())

    def _conversation(self, messages: list[dict], first: int) -> Encoded:
        """Messages from `first` on are the response (0: the whole conversation is)."""
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if self.mask == "last":
            turns = turns[-1:]
        elif self.mask in ("auto", "completion"):
            turns = [i for i in turns if i >= first]
        template = self._template()
        if self.mask == "all":
            rendered = template.whole(self.example, messages)
        else:
            rendered = template.conversation(self.example, messages, turns)
        one = self._tokenised(rendered)
        return _ended(one, self._eos()) if rendered.open_end else one

    def _steps(self, e: Stepwise) -> Encoded:
        """Prompt and steps, each on a line; weight on the token that ends each step, where a step reward is read; the labels of
        these tokens, in order, stand in meta["labels"]."""
        text, spans, roles = e.prompt, [], [(0, len(e.prompt), "prompt")]
        for step in e.completions:
            roles.append((len(text) + 1, len(text) + 1 + len(step), "step"))
            text += "\n" + step + "\n"
            spans.append(Span(len(text) - 1, len(text)))
        one = self._tokenised(Rendered(text, tuple(spans), tuple(roles)))
        if sum(w > 0 for w in one.weights) != len(e.labels):
            raise BadExample(e, "the ends of its steps do not fall on tokens of their own with this tokenizer")
        return replace(self._begun(one), meta={**one.meta, "labels": list(e.labels)})

    def _prompt(self, e: Prompt) -> EncodedPrompt:
        if isinstance(e.prompt, str):
            one = self._begun(self._tokenised(Rendered(e.prompt, (), ((0, len(e.prompt), "prompt"),))))
        else:
            one = self._tokenised(self._template().prompt(e, e.prompt))
        return EncodedPrompt(one.ids, one.weights, one.roles, one.origin, one.meta, prompt=e.prompt)

    # ---- tokens -----------------------------------------------------------------------------------------------------------

    def _template(self) -> Template:
        tok = self.tokenizer
        source = resolve_template(tok, self.chat_template, self.example.tools)
        key = (source, tuple(sorted((k, str(v)) for k, v in tok.special_tokens_map.items())), len(tok), self.ends)
        known = _templates.setdefault(tok, {})
        if key not in known:
            known[key] = Template(tok, source, self.ends)
        return known[key]

    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise UserError("tokenizer.eos_token", None, "a text needs a token that ends it; name the tokenizer's eos_token")
        return self.tokenizer.eos_token_id

    def _begun(self, one: Encoded) -> Encoded:
        """With the token this tokenizer starts a plain text with, if it has one and the text has not."""
        tok = self.tokenizer
        known = _templates.setdefault(tok, {})
        key = ("bos", tok.bos_token, getattr(tok, "add_bos_token", None))
        if key not in known:
            ids = tok("a").input_ids
            known[key] = tok.bos_token_id if ids and ids[0] == tok.bos_token_id else None
        bos = known[key]
        if bos is None or one.ids[:1] == [bos]:
            return one
        roles = ((0, 1, "bos"), *((a + 1, b + 1, role) for a, b, role in one.roles))
        return replace(one, ids=[bos, *one.ids], weights=[0.0, *one.weights], roles=roles)

    def _tokenised(self, r: Rendered) -> Encoded:
        """Ids, and a weight for each token that shares a character with a span."""
        tok = self.tokenizer
        if not tok.is_fast:
            raise UserError("tokenizer", type(tok).__name__, "it cannot say which characters a token covers; use a fast one")
        out = tok(r.text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
        ids, places = list(out["input_ids"]), _places(r.text, out["offset_mapping"])
        special = set(tok.all_special_ids)
        weights, border = [0.0] * len(ids), False
        t = 0
        for span in sorted(r.spans, key=lambda s: s.start):
            while t < len(ids) and places[t][1] <= span.start:
                t += 1
            while t < len(ids) and places[t][0] < span.end:
                outside = r.text[places[t][0] : span.start]
                # A special token may swallow white space of the answer after it (rstrip), and is still no part of it.
                if not (outside and ids[t] in special):
                    border = border or bool(outside)
                    weights[t] = span.weight
                t += 1
        self._refuse_doubled_bos(ids)
        roles = _role_runs(r, places, weights, ids, special)
        e = self.example
        return Encoded(ids, weights, roles, e.origin, e.meta, border=border)

    def _refuse_doubled_bos(self, ids: list[int]) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return
        start_only = bos == self.tokenizer.eos_token_id  # where one token means both, two may meet inside
        if any(a == bos == b for a, b in islice(pairwise(ids), 1 if start_only else None)):
            why = f"it begins twice: the token {self.tokenizer.bos_token!r} stands doubled"
            raise BadExample(self.example, why, "take it out of the row or of the chat template")

    def _checked(self, one: Encoded) -> Encoded:
        self._refuse_doubled_bos(one.ids)
        one = replace(one, weights=[0.0, *one.weights[1:]])  # nothing predicts the first token
        if one.trained <= 0:
            why = f"truncation to {len(one)} tokens leaves nothing to train" if one.cut else "no token of it would be trained"
            raise BadExample(self.example, why)
        top = len(self.tokenizer)
        if isinstance(self.example, Tokenised) and max(one.ids) >= top:
            raise BadExample(self.example, f"the id {max(one.ids)} is none of the {top} of this tokenizer")
        return one


def _places(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Characters of each token. Tokenizers leave white space out of offsets (" word" is given as "word", a blank as nothing):
    what no token claims belongs to the next one, as the model reads it."""
    places, reached = [], 0
    for a, b in offsets:
        gap = reached < a and text[reached:a].isspace()
        places.append((reached if gap or a == b else a, b))
        reached = max(reached, b)
    return places


def _ended(one: Encoded, eos: int) -> Encoded:
    """With a trained end token, once."""
    if one.ids[-1:] == [eos]:
        return replace(one, weights=[*one.weights[:-1], 1.0])
    n = len(one)
    return replace(one, ids=[*one.ids, eos], weights=[*one.weights, 1.0], roles=(*one.roles, (n, n + 1, "end")))


def _role_runs(r: Rendered, places, weights, ids, special) -> tuple:
    runs, k = [], 0
    for t, (a, b) in enumerate(places):
        while k < len(r.roles) and r.roles[k][1] <= a:
            k += 1
        role = r.roles[k][2] if k < len(r.roles) and r.roles[k][0] < b else "template"
        if ids[t] in special:
            role = "end" if weights[t] > 0 else "template"
        if runs and runs[-1][2] == role:
            runs[-1][1] = t + 1
        else:
            runs.append([t, t + 1, role])
    return tuple(tuple(run) for run in runs)


def _fit(example: Example, sides: tuple[Encoded, ...], max_length, truncate, tokenizer) -> tuple[Encoded, ...]:
    """Not longer than max_length. "end" cuts the tail; "start" cuts after a bos, and as much from both sides of a pair, so
    that their prompt stays shared."""
    longest = max(len(s) for s in sides)
    if max_length is None or longest <= max_length:
        return sides
    if truncate == "refuse":
        why = f"it is {longest} tokens long and max_length is {max_length}"
        raise BadExample(example, why, "raise max_length, say truncate: end or start, or on_bad: skip")
    if truncate == "end":
        return tuple(_cut(s, min(len(s), max_length), len(s)) for s in sides)
    keep = int(sides[0].ids[0] == tokenizer.bos_token_id)
    n = longest - max_length
    if len(sides) == 2:
        shared = next((i for i, (a, b) in enumerate(zip(sides[0].ids, sides[1].ids, strict=False)) if a != b), longest)
        if keep + n > shared:
            raise BadExample(example, f"its responses alone are longer than max_length {max_length}", "raise max_length")
    return tuple(_cut(s, keep, keep + n) for s in sides)


def _cut(one: Encoded, a: int, b: int) -> Encoded:
    """Without tokens [a, b)."""
    if a >= b:
        return one
    ids, weights = one.ids[:a] + one.ids[b:], one.weights[:a] + one.weights[b:]
    if weights:
        weights[0] = 0.0
    at = lambda t: t if t <= a else max(a, t - (b - a))
    roles = tuple((at(x), at(y), role) for x, y, role in one.roles if at(y) > at(x))
    return replace(one, ids=ids, weights=weights, roles=roles, cut=one.cut + b - a)
