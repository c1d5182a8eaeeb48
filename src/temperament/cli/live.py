"""Progress of long work, on stderr: finished phases as lines, the running one as a bar with rate, time left and loss.

`Live(say)` is the `tell` of run/tune.py. In a terminal the last line moves; in a pipe or a log file plain lines come, at
most one every ten seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from temperament.cli.say import Say
from temperament.report.show import duration, size

EVERY = 10.0  # seconds between two plain lines
SHOWN = 6  # skills of a look while training


class Live(AbstractContextManager):
    """What a run tells is shown; what it tells last (`end`) is kept in `run`."""

    def __init__(self, say: Say):
        self.say, self.bar, self.task = say, None, None
        self.silent = say.quiet or not say.main
        self.now, self.began, self.printed, self.recent = "", 0.0, 0.0, []
        self.base: dict[str, Any] = {}
        self.run: Any = None

    def __exit__(self, *_: Any) -> None:
        self._end_bar()

    def __call__(self, event: str, **data: Any) -> None:
        if event == "end":
            self.run = data.get("run")
        if not self.silent:
            getattr(self, f"on_{event}", lambda **_: None)(**data)

    # ---- events -----------------------------------------------------------------------------------------------------------

    def on_phase(self, name: str, text: str = "", **_: Any) -> None:
        self._end_bar()
        self.now, self.began, self.recent = name, time.monotonic(), []
        if name in ("load", "check", "base", "dial"):
            self._moving(name, text, None)
        if name == "load":
            self.line("base", text)

    def on_note(self, text: str, **_: Any) -> None:
        self.line("", text, dim=True)

    def on_plan(self, plan: Any, **_: Any) -> None:
        if text := plan_line(plan):
            self.line("plan", text)

    def on_check(self, check: Any, **_: Any) -> None:
        self._end_bar()
        if text := check_line(check):
            self.line("check", text)

    def on_data(
        self, name: str, examples: int, trained: int, held_out: int = 0, left_out: int = 0, notes: Iterable[str] = (), **_: Any
    ) -> None:
        self._end_bar()
        out = f", {left_out:,} that cannot be used are left out" if left_out else ""
        self.line("data", f"{name}: {examples:,} examples, {trained:,} trained tokens, {held_out:,} rows held out{out}")
        for note in notes:
            self.on_note(note)

    def on_arm(self, name: str, where: Iterable[Any] = (), **_: Any) -> None:
        self._end_bar()
        self.base = {}
        self.line("", "")
        self.line(
            "run",
            " ".join([name, *(f"{k} {v}" for k, v in zip(("seed", "rate"), list(where)[1:], strict=False) if v is not None)]),
        )

    def on_measure(self, skill: str, done: int, total: int, **_: Any) -> None:
        if done == 0:
            self.began = time.monotonic()
        self._moving("measure", skill, total, done)

    def on_measured(self, row: str, results: dict[str, Any], cached: bool = False, **_: Any) -> None:
        self._end_bar()
        first = not self.base
        seconds = time.monotonic() - self.began
        means = {name: r for name, r in results.items() if r.mean is not None}
        for i, (role, found) in enumerate(_by_role(means)):
            text = _skills_line(found, {} if first else self.base, max(self.say.err.width - 24, 40))
            took = "" if i else ("  (measured before)" if cached else f"  ({duration(seconds)})" if first else "")
            self.line(("before" if row == "base" else row) if first and i == 0 else "", f"{role.ljust(8)}  {text}{took}")
        self.base = self.base or means

    def on_step(self, name: str, step: int, total: int, loss: float, seconds: float, tokens: int = 0, **terms: Any) -> None:
        self.recent = [*self.recent[-50:], (seconds, tokens)]
        told = self.recent if len(self.recent) > 50 else self.recent[1:]  # the first step warms up: it says nothing of the rest
        spent = sum(s for s, _ in told)
        rate = len(told) / spent if spent and len(told) > 1 else 0.0
        left = (total - step) / rate if rate else 0.0
        worth = {
            k: v for k, v in terms.items() if k.rpartition("/")[2] in ("reward", "accuracy", "kl") and isinstance(v, float)
        }
        numbers = "  ".join([f"loss {loss:.3f}", *(f"{k} {v:.3f}" for k, v in worth.items())])
        pace = f"{rate_text(rate)}  {f'{duration(left)} left  ' if step < total else ''}" if rate else ""
        tail = pace + numbers
        if self.say.err.is_terminal:
            self._moving(name, tail, total, step)
        elif time.monotonic() - self.printed > EVERY or step in (1, total):
            self.line(name, f"{step}/{total}  {tail}")

    def on_look(self, name: str, step: int, skills: dict[str, float], **_: Any) -> None:
        told = [f"{k} {100 * v:.0f} %" for k, v in skills.items()][:SHOWN]
        self.line("", f"step {step}: " + "   ".join(told), dim=True)

    def on_skip(self, name: str, **_: Any) -> None:
        self.line(name, "skipped: its condition does not hold", dim=True)

    def on_done(self, name: str, cached: bool, seconds: float, **_: Any) -> None:
        self._end_bar()
        self.line(name, "unchanged, taken from before" if cached else f"done in {duration(seconds)}")

    def on_dial(self, point: dict[str, Any], **_: Any) -> None:
        self._moving(
            "dial",
            f"{point['shape'].removeprefix('merge.')} at {point['strength']:g}: "
            f"target {100 * point['target']:.0f} %, retained {point['retained_change']:+.1f} points",
            None,
        )

    # ---- lines and the bar ------------------------------------------------------------------------------------------------

    def line(self, head: str, text: str, dim: bool = False) -> None:
        from rich.text import Text

        shown = Text(f"  {head:<10}", style="bold" if head else "")
        shown.append(text, style="dim" if dim else "not bold")
        self.printed = time.monotonic()
        (self.bar.console if self.bar else self.say.err).print(shown)

    def _moving(self, head: str, text: str, total: int | None, done: int = 0) -> None:
        if not self.say.err.is_terminal:
            return
        if self.bar is None:
            self.bar = _bar(self.say.err)
            self.bar.start()
            self.task = self.bar.add_task("", total=total, head="", count="", tail="")
        self.bar.update(self.task, total=total, completed=done, head=head, tail=text, count=f"{done}/{total}" if total else "")

    def _end_bar(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = self.task = None


def _bar(console: Any) -> Any:
    """Name, bar, count and words; no bar where there is nothing to count, and a narrow terminal gets a shorter one."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
    from rich.text import Text

    class Bar(BarColumn):
        def render(self, task: Any) -> Any:
            return super().render(task) if task.total else Text("")

    wide = min(max(console.width - 84, 8), 28)
    return Progress(
        TextColumn(" "),
        TextColumn("{task.fields[head]:<9}", style="bold"),
        SpinnerColumn("dots", style="dim"),
        Bar(wide, style="bright_black", complete_style="default", finished_style="default"),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[tail]}", style="dim"),
        console=console,
        transient=True,
        refresh_per_second=8,
    )


# ---- words -----------------------------------------------------------------------------------------------------------------


def _by_role(results: dict[str, Any]) -> Iterable[tuple[str, list]]:
    for role in ("target", "retained", "other"):
        if found := [(n, r) for n, r in results.items() if r.role == role]:
            yield role, found


def _skills_line(found: list[tuple[str, Any]], before: dict[str, Any], room: int) -> str:
    """Skills by name where they fit; of many, their mean and those that moved most, or stand lowest."""
    whole = "   ".join(skill_text(r, before.get(n)) for n, r in found)
    points = [(n, r) for n, r in found if r.shown_unit == "points"]
    if len(whole) <= room or not points:
        return whole
    level = lambda rows: f"{100 * sum(r.mean for r in rows) / len(rows):.0f}"
    was = [before[n] for n, _ in points if n in before and before[n].mean is not None]
    mean = f"{level(was)} → " if len(was) == len(points) and level(was) != level([r for _, r in points]) else ""
    text = f"{len(points)} skills, mean {mean}{level([r for _, r in points])} %"
    rank = (lambda p: -abs(p[1].mean - before[p[0]].mean)) if was and len(was) == len(points) else (lambda p: p[1].mean)
    said = "; most changed: " if was else "; lowest: "
    for n, r in sorted(points, key=rank):
        more = said + skill_text(r, before.get(n))
        if len(text) + len(more) > room:
            break
        text, said = text + more, "   "
    return text


def skill_text(result: Any, before: Any = None) -> str:
    points = result.shown_unit == "points"
    show = (lambda x: f"{100 * x:.0f}") if points else (lambda x: f"{x:.2f}")
    unit = " %" if points else f" {result.shown_unit}".rstrip()
    moved = (
        f"{show(before.mean)} → "
        if before is not None and before.mean is not None and show(before.mean) != show(result.mean)
        else ""
    )
    return f"{result.skill} {moved}{show(result.mean)}{unit}"


def plan_line(plan: dict[str, Any]) -> str:
    said = plan.get("predicted") or plan
    peak, seconds, disk = (said.get(k) for k in ("peak_bytes", "seconds", "disk_bytes"))
    parts = [
        f"{size(peak)} of memory" if peak else "",
        f"about {duration(seconds)}" if seconds else "",
        f"{size(disk)} on disk" if disk else "",
    ]
    return ", ".join(p for p in parts if p)


def check_line(check: dict[str, Any]) -> str:
    laws = [law for step in check.get("steps", ()) for law in step["laws"]]
    worst = max((law["deviation"] for law in laws if law.get("tolerance")), default=None)
    exempt = len([e for step in check.get("steps", ()) for e in step.get("exempt", ())])
    tail = "" if worst is None else f", largest deviation {worst:.0e}"
    return f"exact: {len(laws)} laws hold{tail}" + (f"; {exempt} not promised here" if exempt else "") if laws else ""


def rate_text(rate: float) -> str:
    return f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step" if rate else ""
