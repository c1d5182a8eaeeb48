"""Every recipe that ships goes through its verb from end to end, a few rows and steps of it."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from temperament.cli import main
from temperament.run.recipe import parse_yaml

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
MOST = {"rows": 48, "items": 6}


def small(x: Any) -> Any:
    """The same recipe on few rows, items and steps; one pass is two steps."""
    if isinstance(x, list):
        return [small(v) for v in x]
    if not isinstance(x, dict):
        return x
    out = {k: min(v, MOST[k]) if k in MOST and isinstance(v, int) else small(v) for k, v in x.items() if k != "stop"}
    if "source" in out:  # it trains
        out = {k: v for k, v in out.items() if k != "epochs"} | {"steps": 2}
    return out


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_it_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", "recipes")
    text = path.read_text()
    recipe = small(parse_yaml(text, path.name))
    recipe["evaluation"] = {"keep": False} | recipe.get("evaluation", {})
    Path("small.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    commands = [shlex.split(x[4:], comments=True)[1:] for x in text.splitlines() if x.startswith("#   temper ")]
    for words in commands:
        if words[:2] == ["sample", "lab/unet"]:  # a picture that the recipe then reads
            assert main(words) == 0, capsys.readouterr().err
    verb = "compare" if any(words[0] == "compare" for words in commands) else "tune"
    methods = ["--methods", "select.full,adapters.lora"] if "--methods" in text else []
    assert main([verb, "small.yaml", "--out", "out", *methods]) == 0, capsys.readouterr().err
    assert Path("out/report.html").exists()
