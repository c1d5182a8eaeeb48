"""From words on the command line to a verb, and from what it returns or raises to stdout, stderr and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import keyword
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from temperament import cli
from temperament.cli.say import Say
from temperament.errors import Interrupted, TemperError, UserError, nearest

MEMORY = {  # names people know from other tools -> ours
    "learning-rate": "lr",
    "num-train-epochs": "epochs",
    "num-epochs": "epochs",
    "max-steps": "steps",
    "output-dir": "out",
    "output": "out",
    "model-name-or-path": "base",
    "model-name": "base",
    "model": "base",
    "base-model": "base",
    "dataset-name": "data",
    "dataset": "data",
    "datasets": "data",
    "train-file": "data",
    "per-device-train-batch-size": "batch",
    "batch-size": "batch",
    "max-new-tokens": "max-new",
    "max-tokens": "max-new",
    "max-seq-length": "max-length",
    "cutoff-len": "max-length",
    "sequence-len": "max-length",
    "tasks": "suite",
    "num-return-sequences": "n",
    "finetuning-type": "method",
    "adapter": "method",
    "lora-r": "rank",
    "lora-rank": "rank",
    "force": "fresh",
    "overwrite-output-dir": "fresh",
    "resume-from-checkpoint": "resume",
    "run-name": "out",
    "format": "as",
}


@dataclass(frozen=True)
class Opt:
    """One thing a verb takes. Name without dashes: a place on the line. No metavar: a flag. `many`: may stand several times.
    `shown`: how its default reads."""

    name: str
    help: str
    metavar: str = ""
    type: Callable[[str], Any] = str
    default: Any = None
    many: bool = False
    shown: str = ""
    choices: Sequence[str] = ()

    @property
    def placed(self) -> bool:
        return not self.name.startswith("-")

    @property
    def dest(self) -> str:
        dest = self.name.lstrip("-").replace("-", "_")
        return dest + "_" if keyword.iskeyword(dest) else dest

    @property
    def usage(self) -> str:
        return self.metavar or self.name.upper() if self.placed else f"{self.name} {self.metavar}".strip()

    @property
    def tail(self) -> str:
        """What follows the help: the default, and that it may be repeated."""
        said = self.shown or ("" if self.default in (None, "", ()) or not self.metavar else f"{self.default}")
        return (" May be repeated." if self.many and not self.placed else "") + (f" [{said}]" if said else "")

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        if self.placed:
            count = "*" if self.many else "?"  # missing ones are named by `parse`, in our words
            parser.add_argument(self.dest, nargs=count, type=self.type, default=self.default, metavar=self.usage)
        elif not self.metavar:
            parser.add_argument(self.name, dest=self.dest, action="store_true")
        else:
            action = "append" if self.many else "store"
            parser.add_argument(
                self.name, dest=self.dest, action=action, type=self.type, default=self.default, metavar=self.metavar
            )


COMMON = (
    Opt("--json", "one JSON object on stdout and nothing else"),
    Opt("--traceback", "show where in the code an error came from"),
    Opt("--help", "this text"),
)


class Wrong(UserError):
    """A request that is wrong as a line of words; the sentence is written out."""

    def __init__(self, sentence: str, field: str, value: object, mend: str):
        super().__init__(field, value, mend)
        self.args = (sentence,)


class _Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose complaints are ours."""

    verb = ""

    def error(self, message: str):
        where, _, what = message.partition(": ")
        field = where.removeprefix("argument ") if where.startswith("argument ") else f"temper {self.verb}"
        value = re.search(r"value: '(.*)'$", what)
        kind = {"int": "a whole number", "float": "a number"}.get((re.search(r"invalid (\w+) value", what) or ["", ""])[1])
        if value and kind:
            raise UserError(field, value[1], f"give {kind}")
        raise Wrong(f"{field}: {what or message}; see temper {self.verb} --help.", field, None, what or message)


def parse(verb: str, options: Sequence[Opt], argv: list[str]) -> argparse.Namespace:
    """The options given. Raises UserError for what is unknown (with the name that was meant), missing or of the wrong type."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.verb = verb
    known = (*options, *COMMON)
    for option in known:
        option.add_to(parser)
    # intermixed: options may stand between places
    given, unknown = parser.parse_known_intermixed_args(argv)
    for word in unknown:
        name = word.split("=")[0]
        if word.startswith("-") and len(name) > 1:
            mend = _meant(name, [o.name for o in known if not o.placed])
            raise Wrong(f"temper {verb} has no option {name!r}: {mend}", f"temper {verb}", name, mend)
        takes = " ".join(o.usage for o in options if o.placed) or "nothing"
        mend = f"it takes {takes}; quote what has blanks"
        raise Wrong(f"temper {verb}: {word!r} is one word too many: {mend}.", f"temper {verb}", word, mend)
    for option in options:
        value = getattr(given, option.dest)
        if option.choices and value is not None and value not in option.choices:
            raise UserError(option.name, value, nearest(value, option.choices))
    return given


def _meant(name: str, known: list[str]) -> str:
    plain = name.lstrip("-").replace("_", "-").lower()
    ours = f"--{MEMORY.get(plain, plain)}"
    close = [ours] if ours in known else difflib.get_close_matches(ours, known, n=2, cutoff=0.7)
    if close:
        return f"did you mean {' or '.join(close)}?"
    if "--set" in known:
        return "what is trained and how stands in the recipe; change an entry for one run with --set KEY=VALUE."
    return f"it takes {', '.join(k for k in known if k != '--help')}."


def pairs(field: str, text: str | None) -> dict[str, str]:
    """`prompt=question,completion=answer` as a mapping."""
    found = [p.partition("=") for p in (text or "").split(",") if p.strip()]
    if any(not (a.strip() and b.strip()) for a, _, b in found):
        raise UserError(field, text, "write OURS=THEIRS, e.g. prompt=question,completion=answer")
    return {a.strip(): b.strip() for a, _, b in found}


def as_flags(problem: UserError, options: Sequence[Opt]) -> UserError:
    """A sentence that advises an entry of a recipe, with the flag of this verb that does the same."""
    names, sentence = {o.name for o in options}, str(problem)
    if "--skip-bad" in names:
        sentence = sentence.replace("say on_bad: skip", "add --skip-bad")
    if "--columns" in names:
        said = lambda m: "rename with --columns " + m[1].replace(": ", "=").replace(", ", ",")
        sentence = re.sub(r"rename with columns: \{(.*?)\}", said, sentence)
    problem.args = (sentence,)
    return problem


def need(verb: str, a: argparse.Namespace, *dests: str) -> None:
    """Refuse to go on without these."""
    options = {o.dest: o for o in cli.module(verb).OPTIONS}
    for dest in dests:
        if getattr(a, dest) in (None, [], ""):
            o = options[dest]
            called = o.usage if o.placed else o.name
            what = o.help.split("; ")[0].split(". ")[0].rstrip(".")
            raise Wrong(f"temper {verb} needs {called}: {what}.", called, None, what)


# ---- carrying out ----------------------------------------------------------------------------------------------------------


def carry_out(argv: list[str]) -> int:
    from temperament.cli import helps

    say = Say(json="--json" in argv, main=int(os.environ.get("RANK", "0") or 0) == 0)
    loud = "--traceback" in argv or os.environ.get("TEMPERAMENT_TRACEBACK", "") not in ("", "0")
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            if len(argv) > 1 and argv[1] in cli.ALL:
                say.print(helps.of_verb(argv[1]))
            else:
                say.print(helps.overview())
            return 0
        if argv[0] in ("-V", "--version", "version"):
            say.print(helps.version())
            return 0
        verb, *rest = argv
        if verb not in cli.ALL:
            mend = nearest(verb, cli.ALL)
            raise Wrong(f"temper has no verb {verb!r}: {mend}", "temper", verb, mend)
        if "-h" in rest or "--help" in rest:
            say.print(helps.of_verb(verb))
            return 0
        return _verb(verb, rest, say)
    except BrokenPipeError:  # `temper parts | head`: the reader has seen enough
        with contextlib.suppress(Exception):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _ended(Interrupted("Interrupted."), say, loud)
    except TemperError as problem:
        return _ended(problem, say, loud)
    except Exception as problem:
        sentence = f"internal error: {type(problem).__name__}: {' '.join(str(problem).split())[:300] or 'no message'}"
        return _ended(
            TemperError(f"{sentence}; run again with --traceback (or TEMPERAMENT_TRACEBACK=1) and report it."),
            say,
            loud,
            problem,
        )


def _verb(verb: str, rest: list[str], say: Say) -> int:
    module = cli.module(verb)
    a = parse(verb, module.OPTIONS, rest)
    need(verb, a, *(o.dest for o in module.OPTIONS if o.placed and not o.shown))
    say.quiet = getattr(a, "quiet", False)
    _calm()
    # What libraries print must not spoil what we print.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            data = module.run(a, say)
        except UserError as problem:
            raise as_flags(problem, module.OPTIONS) from None
    if say.main:
        if a.json:
            say.print(json.dumps(data, ensure_ascii=False, indent=1 if say.terminal else None, default=str))
        else:
            module.show(data, say, a)
    return 1 if isinstance(data, dict) and data.get("ok") is False else 0


def _calm() -> None:
    """Other libraries' progress bars and advice stay off our terminal; set these variables yourself to have them back."""
    import warnings

    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TQDM_DISABLE", "1"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
    ):
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _json(value: Any) -> Any:
    """A value as it is where JSON can say it, else as it reads: NaN, a key that is no word, a list in itself."""
    try:
        json.dumps(value, allow_nan=False, default=str)
        return value
    except (ValueError, TypeError, RecursionError):
        return repr(value)


def _ended(problem: TemperError, say: Say, loud: bool, cause: BaseException | None = None) -> int:
    """One sentence, and the exit code. Of several processes each says which one it is."""
    if loud:
        import traceback

        traceback.print_exception(cause or problem, file=sys.stderr)
    if say.json and say.main:
        rest = {k: _json(getattr(problem, k, None)) for k in ("field", "value", "mend")}
        say.print(json.dumps({"error": str(problem), **rest}, ensure_ascii=False, default=str))
    say.error(str(problem) if say.main else f"process {os.environ['RANK']}: {problem}")
    return problem.exit_code
