"""The command `temper`: one short file a verb, found by name and imported when it is used.

A verb is a module here with

    a docstring     first line: its purpose; then an example, indented; then what is worth knowing. This is its --help
    OPTIONS         what it takes (`app.Opt`)
    run(a, say)     does it by calling the floors below; returns plain JSON data
    show(data, say, a)      the same data for a person, on stdout

With --json the data is the one JSON object on stdout; progress goes to stderr in either case. Exit codes: 0 done, 1 the
work failed, 2 the request was wrong, 130 interrupted. Nothing here imports torch; a verb does when it runs.
"""

from __future__ import annotations

import importlib
import sys

VERBS = {
    "Make": {
        "new": "Write a complete, commented recipe.",
        "tune": "Carry out a recipe, and show what was gained and what was lost.",
        "compare": "Train several methods to the same gain and compare what each one lost; or carry out a study.",
        "merge": "Merge several tuned models into one.",
        "extract": "Make a small adapter or delta from any two checkpoints, to a stated rank, share or error.",
        "dial": "Find how much of a finished change to use, without training again.",
        "export": "Write a finished run as a model, an adapter or a delta that others load.",
    },
    "Look first": {
        "data": "Show what a model will really see of a file, and which tokens carry loss.",
        "plan": "Say what a recipe will take: memory, time, disk.",
        "check": "Check that training is exact on your model and data.",
        "doctor": "Look at this machine and say what would stand in the way.",
    },
    "Use": {
        "eval": "Measure what a model can do.",
        "generate": "Let a model complete prompts.",
        "chat": "Talk with a model.",
        "sample": "Let a generator paint captions.",
        "diagnose": "Look at what tuning changed in the weights.",
    },
    "Learn": {
        "parts": "List all methods, by room.",
        "part": "Show one method: what it does, its formula, its options.",
        "claim": "List the papers' claims, or run one.",
    },
}
ALL = {verb: line for group in VERBS.values() for verb, line in group.items()}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from temperament.cli import app

    return app.carry_out(list(sys.argv[1:] if argv is None else argv))


def module(verb: str):
    return importlib.import_module(f"temperament.cli.{verb}")
