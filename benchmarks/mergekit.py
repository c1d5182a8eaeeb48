"""A Python that has mergekit: TEMPER_MERGEKIT_PYTHON, this one, or one made for it beside this environment.

    python -m benchmarks.mergekit          makes it where there is none, and prints its path

mergekit gets an environment of its own that also sees the packages of this one: torch is not installed twice, and nothing here
changes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

WANTED = "mergekit>=0.1.5,<0.2"
OWN = Path(__file__).resolve().parents[1] / ".venv-mergekit"


def has_mergekit(python: str | Path | None) -> bool:
    return bool(python) and subprocess.run([python, "-c", "import mergekit.merge"], capture_output=True).returncode == 0


def found() -> str | None:
    """The first Python that has it."""
    return next((str(p) for p in (os.environ.get("TEMPER_MERGEKIT_PYTHON"), sys.executable, OWN / "bin/python")
                 if p and Path(p).exists() and has_mergekit(p)), None)  # fmt: skip


def installed() -> str | None:
    """It, made where there is none; None (with a line that says why) where it cannot be had."""
    if python := found():
        return python
    print(f"installing {WANTED} in {OWN.name} (once) ...", file=sys.stderr, flush=True)
    python = OWN / "bin/python"
    here = sysconfig.get_paths()["purelib"]
    steps = [
        ([sys.executable, "-m", "venv", str(OWN)], None),
        ([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", WANTED], here),
    ]
    for command, sees in steps:
        if sees:
            where = [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
            site = subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
            (Path(site) / "beside.pth").write_text(sees + "\n", encoding="utf-8")
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            last = (run.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"mergekit could not be installed ({last[:200]})", file=sys.stderr)
            return None
    return str(python) if has_mergekit(python) else None


if __name__ == "__main__":
    python = installed()
    print(python or "none")
    sys.exit(0 if python else 1)
