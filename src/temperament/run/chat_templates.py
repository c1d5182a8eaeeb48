"""Chat templates that a merge file may ask for: by name, as Jinja, or `auto`, the one most of its models have."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from temperament.errors import UserError, nearest
from temperament.run.merge_inputs import Input
from temperament.run.vocabulary import tokenizer_of

CHATML = """\
{%- for m in messages %}
{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
MISTRAL = """\
{{- bos_token }}
{%- set ns = namespace(before='') %}
{%- for m in messages %}
{%- if m['role'] == 'system' %}
{%- set ns.before = m['content'] + '\\n\\n' %}
{%- elif m['role'] == 'user' %}
{{- '[INST] ' + ns.before + m['content'] + ' [/INST]' }}
{%- set ns.before = '' %}
{%- else %}
{{- ' ' + m['content'] + eos_token }}
{%- endif %}
{%- endfor %}"""
ALPACA = """\
{%- if messages and messages[0]['role'] != 'system' %}
{{- 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n\\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m['role'] == 'system' %}
{{- m['content'] + '\\n\\n' }}
{%- elif m['role'] == 'user' %}
{{- '### Instruction:\\n' + m['content'] + '\\n\\n' }}
{%- else %}
{{- '### Response:\\n' + m['content'] + eos_token + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '### Response:\\n' }}
{%- endif %}"""
EXAONE = """\
{%- if messages and messages[0]['role'] != 'system' %}
{{- '[|system|][|endofturn|]\\n' }}
{%- endif %}
{%- for m in messages %}
{{- '[|' + m['role'] + '|]' + m['content'] + ('\\n' if m['role'] == 'user' else '[|endofturn|]\\n') }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '[|assistant|]' }}
{%- endif %}"""
NAMED = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "alpaca": ALPACA, "exaone": EXAONE}


def chosen(asked: str, inputs: Sequence[Input]) -> str | None:
    """The Jinja text; None where `auto` finds none. UserError before anything is written."""
    if asked == "auto":
        had = [t for t in map(_own, inputs) if t]
        return Counter(had).most_common(1)[0][0] if had else None  # of several as common the first
    if asked in NAMED:
        return NAMED[asked]
    if "{" not in asked:
        raise UserError("chat_template", asked, f"give a Jinja template, auto, or a name: {nearest(asked, NAMED)}")
    import jinja2

    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", asked)  # a tag of transformers' own
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except jinja2.TemplateError as problem:
        raise UserError("chat_template", asked, f"it is no Jinja template ({problem})") from None
    return asked


def _own(model: Input) -> str | None:
    try:
        template: Any = tokenizer_of(model).chat_template
    except UserError:
        return None
    template = template.get("default") if isinstance(template, dict) else template
    return template.strip() if template else None
