"""Parts of the `inference:` slot in a whole run."""

from __future__ import annotations

import json

from temperament.run.tune import tune
from tests.resuming import recipe


def outputs(run):
    return [o["output"] for o in json.loads((run.folder / "steps" / "look" / "outcomes.json").read_text())["outcomes"]]


def test_eft_with_an_untuned_pair_is_the_base_also_when_running_ahead(tmp_path):
    look = {"name": "look", "measure": True}
    said = [
        outputs(tune(recipe(look, inference=i), tmp_path / str(k)))
        for k, i in enumerate(
            (
                [],
                [{"decode.eft": {"tuned": "lab/lm", "reference": "lab/lm"}}],
                [{"decode.eft": {"tuned": "lab/lm", "reference": "lab/lm", "draft": 3}}],
            )
        )
    ]
    assert said[0] == said[1] == said[2] and any(said[0])
