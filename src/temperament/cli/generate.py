"""Let a model complete prompts.

    temper generate lab/lm --prompt "reverse: abc ->"
    temper generate runs/first --prompt "What is 12 + 30?" --chat --n 4 --temperature 0.8
    temper generate models/mine --file prompts.txt --json

MODEL is a lab base, a folder, a Hugging Face id, a run (with its inference parts) or an adapter. Equal seed, equal text,
whatever the batch. With --chat a prompt is the user's message, put into the model's own template.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from temperament.cli.app import Opt
from temperament.cli.say import Say

OPTIONS = (
    Opt("model", "lab/lm, a folder, a Hugging Face id, a run or an adapter", "MODEL"),
    Opt("--prompt", "what it goes on with", "TEXT", many=True, shown="standard input, when it is no terminal"),
    Opt("--file", "prompts, one a line", "FILE"),
    Opt("--chat", "the prompt is a user's message"),
    Opt("--system", "system message, with --chat", "TEXT"),
    Opt("--n", "completions of each prompt", "N", int, 1),
    Opt("--temperature", "0 takes the likeliest token", "T", float, shown="0, or 1 when --n is above 1"),
    Opt("--top-p", "draw from the likeliest tokens that hold this share", "P", float, 1.0),
    Opt("--top-k", "draw from so many likeliest tokens; 0: all", "K", int, 0),
    Opt("--max-new", "tokens at most", "N", int, 128),
    Opt("--stop", "end at this text", "TEXT", many=True),
    Opt("--seed", "every draw follows from it", "N", int, 0),
    Opt("--device", "auto, cpu or cuda", "DEVICE", default="auto"),
)


def run(a: Any, say: Say) -> dict[str, Any]:
    from temperament import api
    from temperament.run.generate import as_chat, needs_template
    from temperament.run.reopen import subject

    prompts: list[Any] = _prompts(a)
    model = subject(a.model, a.device)
    if a.chat:
        needs_template(model)
        prompts = [as_chat(p, a.system) for p in prompts]
    made = api.generate(
        model,
        prompts,
        n=a.n,
        temperature=a.temperature,
        max_new=a.max_new,
        top_p=a.top_p,
        top_k=a.top_k,
        stop=a.stop or (),
        seed=a.seed,
    )
    return {"model": a.model, "seed": a.seed, "completions": made}


def _prompts(a: Any) -> list[str]:
    from temperament.cli.app import need
    from temperament.errors import UserError

    if a.prompt:
        return list(a.prompt)
    if a.file:
        try:
            return [line for line in Path(a.file).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as problem:
            raise UserError(
                "--file", a.file, f"it cannot be read as text ({getattr(problem, 'strerror', None) or 'not UTF-8'})"
            ) from None
    if not sys.stdin.isatty():
        a.prompt = [sys.stdin.read().rstrip("\n")]
    need("generate", a, "prompt")
    if not a.prompt[0]:
        need("generate", a, "file")
    return list(a.prompt)


def show(data: dict[str, Any], say: Say, a: Any) -> None:
    from rich.text import Text

    from temperament.report.show import clean

    for i, one in enumerate(data["completions"]):
        prompt = one["prompt"] if isinstance(one["prompt"], str) else one["prompt"][-1]["content"] + "\n"
        for out in one["outputs"]:
            say.out.print(Text.assemble((str(clean(prompt)), "dim"), str(clean(out["text"]))), soft_wrap=True)
            if out["finished"] == "length":
                say.note(f"(stopped after {out['tokens']} tokens; --max-new takes more)")
        if i + 1 < len(data["completions"]):
            say.out.print()
