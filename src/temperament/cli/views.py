"""How results read on a terminal, where more than one verb shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from temperament.cli.say import Say


def run_result(data: dict[str, Any], say: Say) -> None:
    """The ledger, the dial's best point, and where things lie."""
    from temperament.report import terminal

    say.out.print()
    if data.get("ledger"):
        say.out.print(terminal.ledger(data["ledger"], say.out.width))
    else:
        say.out.print("Nothing was measured.")
    if data.get("dial"):
        say.out.print()
        dial_best(data["dial"], say)
    say.out.print()
    folder = Path(data["out"])
    for what, name in (("report", "report.html"), ("change", "delta"), ("numbers", "run.json")):
        if (folder / name).exists():
            place(what, folder / name, say)


def place(what: str, path: Any, say: Say) -> None:
    from rich.text import Text

    say.out.print(Text.assemble((f"{what:<9}", "dim"), str(path)), soft_wrap=True)


def dial_best(dial: dict[str, Any], say: Say) -> None:
    """One sentence: how much of the change to use for the budget."""
    from rich.text import Text

    best, budget = dial["best"], dial["budget"]
    kind = "" if best["shape"] == "merge.linear" else f" ({best['shape']})"
    kept = within(best, budget)
    text = Text.assemble(
        ("dial     ", "dim"),
        "at strength ",
        (f"{best['strength']:g}", "bold"),
        f"{kind} the targets change by {points(best['target_change'])} and what was known by {points(best['retained_change'])}",
    )
    text.append(f": within the budget of {budget:g}" if kept else f"; no point is within the budget of {budget:g}")
    say.out.print(text)


def within(point: dict[str, Any], budget: float) -> bool:
    return point["retained_change"] >= -budget - 1e-9


def points(x: float) -> str:
    return f"{signed(x)} points"


def percent(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.0f} %"


def flat(data: Any, say: Say, skip: tuple[str, ...] = ()) -> None:
    """Any result: scalars a line each, lists of alike rows as tables."""
    for key, value in data.items():
        if key in skip or value in (None, [], {}, ""):
            continue
        if isinstance(value, list) and all(isinstance(v, dict) for v in value):
            say.out.print(f"\n[bold]{key}[/bold]")
            columns = [c for c in value[0] if not isinstance(value[0][c], (dict, list))]
            say.table(columns, [[short(v.get(c)) for c in columns] for v in value])
        elif isinstance(value, dict):
            say.out.print(f"\n[bold]{key}[/bold]")
            for k, v in value.items():
                entry(k, v, say)
        else:
            entry(key, value, say)


def entry(key: str, value: Any, say: Say) -> None:
    from rich.text import Text

    say.out.print(Text.assemble((f"  {str(key).replace('_', ' '):<22} ", "dim"), short(value)), soft_wrap=True)


def short(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (dict, list)):
        return (
            ", ".join(f"{k} {short(v)}" for k, v in value.items()) if isinstance(value, dict) else ", ".join(map(short, value))
        )
    return str(value)


def signed(x: float | None) -> str:
    return "–" if x is None else f"{x:+.1f}".replace("-", "−")


def interval(ci: Any, unit: str) -> str:
    if not ci:
        return ""
    low, high = (100 * v if unit == "points" else v for v in ci)
    return f"{low:.0f} to {high:.0f}" if unit == "points" else f"{low:.3f} to {high:.3f}"


def mark(ok: bool) -> Any:
    from rich.text import Text

    return Text("✓", "bold green") if ok else Text("✗", "bold red")


def certified(certificate: dict[str, Any], path: Any, say: Say) -> None:
    """What was written, and that it was reloaded and compared."""
    place("written", path, say)
    how = "reloaded in a fresh process and compared with the live model"
    if certificate.get("max_difference") is not None:
        how += f": largest difference of a logit {certificate['max_difference']:.1e}"
    if certificate.get("compared") == "tensors":
        how = f"read again from disk and compared tensor by tensor, not by its outputs: {certificate['why']}"
    kept = certificate.get("rounding")
    if kept and kept["max_difference"]:
        how += f"; stored as {certificate['dtype']}, which moves a logit by at most {kept['max_difference']:.1e}"
    say.out.print(f"[dim]checked   {how}[/dim]", highlight=False)
