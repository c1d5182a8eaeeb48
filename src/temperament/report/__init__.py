"""What a person sees of a run: the page, the terminal table, the pictures."""

from __future__ import annotations

from pathlib import Path


def write(folder: str | Path) -> Path:
    """(Re)write report.html of a run folder from what the run left in it."""
    from temperament.report.html import read_run, render

    return render(read_run(folder), Path(folder) / "report.html")
