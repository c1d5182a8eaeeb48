"""The ledger's table, pictures and page. `render(run, out)` writes report.html; `read_run(folder)` gathers what it shows."""

from temperament.report.html import html, read_run, render

__all__ = ["html", "read_run", "render"]
