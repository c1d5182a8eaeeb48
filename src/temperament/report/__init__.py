"""What a person sees of a run: the page, the terminal table, the pictures."""

from __future__ import annotations

from pathlib import Path

from temperament.report.html import html, read_run, render

__all__ = ["html", "read_run", "render", "write"]


def write(folder: str | Path) -> Path:
    """(Re)write report.html of a run folder from what the run left in it."""
    return render(read_run(folder), Path(folder) / "report.html")
