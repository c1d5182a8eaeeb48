"""What the package imports is what it asks for, and nothing else; what only some verbs need is an extra that `doctor` knows."""

import ast
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from temperament.run import doctor

ROOT = Path(__file__).parents[1]
CALLED = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "huggingface_hub": "huggingface-hub",
}  # module -> distribution
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {extra: {Requirement(r).name for r in wanted} for extra, wanted in PROJECT["optional-dependencies"].items()}


def imported(folder: str) -> set[str]:
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    outside = found - set(sys.stdlib_module_names) - {"temperament"}
    return {CALLED.get(name, name) for name in outside}


def test_what_the_package_imports_is_what_it_asks_for():
    asked = {Requirement(r).name for r in PROJECT["dependencies"]}
    optional = EXTRAS["data"] | EXTRAS["images"] | EXTRAS["merge"] | EXTRAS["search"]
    witness = {"peft"}  # where it is installed, it reads what was written for it
    assert asked <= imported("src") <= asked | optional | witness and optional <= imported("src")


def test_the_tests_and_benchmarks_find_what_they_import():
    asked = {Requirement(r).name for r in PROJECT["dependencies"]}
    own = {p.stem for folder in ("tests", "benchmarks") for p in (ROOT / folder).rglob("*")} | {"tests", "benchmarks"}
    assert imported("benchmarks") - own - {"mergekit"} <= asked | EXTRAS["bench"] | EXTRAS["test"]
    assert imported("tests") - own - {"mergekit", "trl"} <= asked | EXTRAS["test"]


def test_the_doctor_knows_every_extra():
    assert set(doctor.EXTRAS) == set(EXTRAS) - {"dev"}
    assert EXTRAS["data"] | EXTRAS["images"] | EXTRAS["merge"] | EXTRAS["search"] <= EXTRAS["test"]


def test_what_is_missing_is_said_and_is_no_problem(monkeypatch):
    had = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "pyarrow" else had(name))
    monkeypatch.setattr(doctor, "_wanted", lambda: [Requirement("pyarrow>=15; extra == 'data'"), Requirement("torch>=2.8")])
    problems = []
    doctor._versions(problems)
    extras = {e["name"]: e for e in doctor._extras()}
    assert extras["data"]["missing"] == ["pyarrow"] and "temperament[data]" in extras["data"]["mend"]
    assert not problems and doctor._lab(problems) and not problems
