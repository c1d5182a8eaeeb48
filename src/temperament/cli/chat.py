"""Talk with a model.

    temper chat lab/lm-instruct
    temper chat runs/first --system "Answer in one word."

/exit (or Ctrl-D) ends, /new begins again, /undo takes the last exchange back. In a pipe each line is a message. The model
needs a chat template; `temper generate` lets any model go on with a text.
"""

from __future__ import annotations

import sys
from typing import Any

from temperament.cli.app import Opt
from temperament.cli.say import Say

OPTIONS = (
    Opt("model", "lab/lm-instruct, a folder, a Hugging Face id, a run or an adapter", "MODEL"),
    Opt("--system", "system message", "TEXT"),
    Opt("--temperature", "0 takes the likeliest token", "T", float, 0.0),
    Opt("--top-p", "draw from the likeliest tokens that hold this share", "P", float, 1.0),
    Opt("--max-new", "tokens of an answer at most", "N", int, 256),
    Opt("--seed", "every draw follows from it", "N", int, 0),
    Opt("--device", "auto, cpu or cuda", "DEVICE", default="auto"),
)


def run(a: Any, say: Say) -> dict[str, Any]:
    from temperament import api
    from temperament.run.generate import needs_template
    from temperament.run.reopen import subject

    model = subject(a.model, a.device)
    needs_template(model)
    messages = start = [{"role": "system", "content": a.system}] if a.system else []
    talking = sys.stdin.isatty() and not a.json
    if talking:
        say.note(f"{a.model}. /exit ends, /new begins again, /undo takes the last exchange back.")
    while (said := _heard(talking)) not in (None, "/exit", "/quit"):
        if said in ("/new", "/undo"):
            messages = list(start) if said == "/new" else messages[: max(len(messages) - 2, len(start))]
            continue
        if not said:
            continue
        how = {"temperature": a.temperature, "max_new": a.max_new, "top_p": a.top_p, "seed": a.seed + len(messages) + 1}
        messages = api.chat(model, said, messages, **how)
        if not a.json:
            from temperament.report.show import clean

            say.out.print(str(clean(messages[-1]["content"])), soft_wrap=True, markup=False)
    return {"model": a.model, "messages": messages}


def _heard(talking: bool) -> str | None:
    if talking:
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def show(data: dict[str, Any], say: Say, a: Any) -> None:
    """The conversation has been shown as it went."""
