"""The three ways a run can end badly, and the exit code of each (the contract for scripts).

    UserError      2   the request was wrong: a recipe, an argument, a file. One sentence: field, value, mend.
    WorkFailed     1   the request was right and the work failed: a loss that is not finite, a full disk.
    Interrupted  130   stopped by the user; what is on disk can be resumed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TemperError(Exception):
    exit_code = 1


class UserError(TemperError):
    """A wrong request. `UserError("steps[0].train.objective", "dpoo", "use 'objectives.preference.dpo'")` reads
    "steps[0].train.objective is 'dpoo': use 'objectives.preference.dpo'."
    """

    exit_code = 2

    def __init__(self, field: str, value: object, mend: str):
        self.field, self.value, self.mend = field, value, mend
        shown = repr(value)
        shown = shown if len(shown) < 120 else shown[:110] + "..." + shown[-1]
        super().__init__(one_line(f"{field} is {shown}: {mend}{'' if mend.endswith('?') else '.'}"))

    def __reduce__(self):  # what travels between processes is what it was made of
        return type(self), (self.field, self.value, self.mend)


class Unusable(UserError):
    """Something in a file cannot be used: "train.jsonl, line 5: it lacks 'completion'; mend it." where: file and line."""

    def __init__(self, where: str, what: object, mend: str):
        super().__init__(where, what, mend)
        self.args = (one_line(f"{where}: {mend}{'' if mend.endswith('?') else '.'}"),)


class WorkFailed(TemperError):
    exit_code = 1


class Interrupted(TemperError):
    exit_code = 130


def one_line(text: str) -> str:
    """Text as one printable line: a name from a file can neither break the sentence nor steer the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that offers the closest known names: "did you mean 'a' or 'b'?", or the list when nothing is close."""
    known = sorted(known)
    word = [k for k in known if k.split(".")[-1] == name.split(".")[-1]][:2]  # the right name in the wrong room
    close = word or difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + ", ".join(known[:15]) + (", ..." if len(known) > 15 else "")
