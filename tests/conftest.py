"""Tests run with the sources of this checkout, also in the processes they start, and leave the user's cache alone."""

import os
import sys
import tempfile
from pathlib import Path

SRC = str(Path(__file__).resolve().parents[1] / "src")
os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (SRC, os.environ.get("PYTHONPATH")) if p)
# Two cores that other work may share: threads that wait do not burn.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault(
    "TEMPERAMENT_CACHE",
    str(Path(tempfile.gettempdir()) / f"temperament-test-cache-{os.getuid() if hasattr(os, 'getuid') else 0}"),
)
sys.path.insert(0, SRC)
