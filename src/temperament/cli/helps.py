"""Help: the overview, and a verb's page made of its docstring and its options."""

from __future__ import annotations

import inspect
import os
import shutil
import sys
import textwrap

from temperament import cli
from temperament.cli.app import COMMON, Opt


def overview() -> str:
    lines = [
        bold("temper") + ": fine-tune foundation models, keep what they knew, and see what was gained and what was lost.",
        "",
        "  temper new sft --base lab/lm --data new.jsonl --out recipe.yaml",
        "  temper tune recipe.yaml --out runs/first",
    ]
    for group, verbs in cli.VERBS.items():
        lines += ["", bold(group)]
        for verb, line in verbs.items():
            lines.append(f"  {bold(verb.ljust(10))} {line.rstrip('.')}")
    lines += [
        "",
        *_wrapped(
            "`temper VERB --help` explains one. Every verb takes --json. Exit codes: 0 done, 1 the work failed, "
            "2 the request was wrong, 130 interrupted and resumable.",
            _width(),
        ),
    ]
    return "\n".join(lines)


def version() -> str:
    from importlib import metadata

    return f"temperament {metadata.version('temperament')}"


def of_verb(verb: str) -> str:
    module = cli.module(verb)
    places = [o for o in module.OPTIONS if o.placed]
    usage = " ".join(
        ["temper", verb, *(f"[{o.usage}]" if o.shown else o.usage + (" ..." if o.many else "") for o in places), "[options]"]
    )
    lines = [bold(usage), "", *(_reflowed(module.__doc__ or "")), ""]
    options = [o for o in module.OPTIONS if not o.placed]
    left = max(len(o.usage) for o in (*module.OPTIONS, *COMMON)) + 2
    for group in (places, options, COMMON):
        for o in group:
            lines += _option(o, left)
        lines += [""] if group else []
    return "\n".join(lines).rstrip()


def _option(o: Opt, left: int) -> list[str]:
    text = o.help.rstrip(".") + ("." if " May be" in o.tail else "") + o.tail
    first, *rest = _wrapped(text, _width() - left - 2)
    return [f"  {bold(o.usage.ljust(left))}{first}", *(" " * (left + 2) + line for line in rest)]


def _reflowed(doc: str) -> list[str]:
    """Paragraphs are wrapped to the terminal; indented lines (examples) are kept."""
    out: list[str] = []
    for block in inspect.cleandoc(doc).split("\n\n"):
        if block.startswith("  "):
            out += block.split("\n")
        else:
            out += _wrapped(" ".join(block.split()), _width())
        out.append("")
    return out[:-1]


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 30), break_long_words=False, break_on_hyphens=False) or [""]


def _width() -> int:
    return min(shutil.get_terminal_size((100, 24)).columns, 110)


def bold(text: str) -> str:
    return f"\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text
