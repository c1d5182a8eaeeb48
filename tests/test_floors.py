"""The house stands: imports go downward, rooms of methods do not know each other, and asking for the package loads no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "temperament"
FLOORS = [
    {"errors", "stats", "parts", "protocols", "delta", "nn"},
    {"engine", "aides"},
    {"bases", "methods", "train"},
    {"run", "serve"},
    {"report"},
    {"cli", "api", "__init__", "__main__"},
]
FLOOR = {name: k for k, names in enumerate(FLOORS) for name in names}


def imported(path: Path):
    """Modules of the package that a file imports, anywhere in it, as paths from its root."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("temperament"):
            inner = (node.module or "").split(".")[1:]
            for alias in node.names:
                yield [*inner, alias.name]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1:] for a in node.names if a.name.startswith("temperament."))


FILES = [pytest.param(p, id=str(p.relative_to(SRC))) for p in sorted(SRC.rglob("*.py"))]


@pytest.mark.parametrize("path", FILES)
def test_imports_go_downward(path):
    here = path.relative_to(SRC).with_suffix("").parts
    for found in imported(path):
        there = found[0] if found[0] in FLOOR else None
        assert there is None or FLOOR[there] <= FLOOR[here[0]], f"{'/'.join(here)} imports {'.'.join(found)}"
        if here[0] == "methods" and there == "methods" and len(here) > 2:
            assert found[1] == here[1], f"{'/'.join(here)} imports {'.'.join(found)}"


def test_asking_for_the_package_loads_no_torch():
    asked = "import sys, temperament, temperament.cli; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", asked], check=True)
