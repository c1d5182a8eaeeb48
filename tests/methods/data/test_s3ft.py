"""S3FT: what is trained on is the model's own where the judge accepts it, and what was given elsewhere."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from temperament.bases.load import load
from temperament.errors import UserError
from temperament.methods.aides.lab_oracle import LabOracle
from temperament.methods.aides.match import Match
from temperament.methods.data.lab import LabData
from temperament.methods.data.s3ft import S3FT
from temperament.run.tune import tune
from temperament.train.context import Context
from temperament.train.world import World
from tests.resuming import recipe

SEED = int(torch.seed() % 10**6)


@pytest.fixture(scope="module")
def base():
    return load("lab/lm")


class Says(SimpleNamespace):
    role = "judge"

    def ask(self, requests):
        return [self.always] * len(requests)


def made(base, judge, **options) -> list[dict]:
    ctx = Context(base, World(), SEED, aides={"judge": judge})
    return list(
        S3FT(**{"rows": LabData(["add", "add3", "shift"], 18, seed=SEED), "retries": 1, "max_new": 24, **options}).make(ctx)
    )


def test_a_judge_that_accepts_all_gives_the_models_own_and_one_that_accepts_none_the_given(base):
    given = LabData(["add", "add3", "shift"], 18, seed=SEED).examples(None)
    never = made(base, Says(always=False))
    assert [(r["prompt"], r["completion"], r["source"]) for r in never] == [(e.prompt, e.completion, "given") for e in given]
    always = made(base, Says(always=True))
    own = [r for r in always if r["source"] == "own"]
    assert len(own) > 12  # an answer that never ends is none
    mean = lambda rows: sum(r["nll"] for r in rows) / len(rows)
    assert mean(always) < mean(never)  # what the model says itself is what it finds likely


def test_every_target_satisfies_the_judge_or_was_given(base):
    oracle, examples = LabOracle(), LabData(["add", "add3", "shift"], 18, seed=SEED).examples(None)
    rows = made(base, oracle, retries=2, paraphrase="{prompt}{answer}\n{prompt}")
    for r, e in zip(rows, examples, strict=True):
        request = {"prompt": e.prompt, "answer": e.completion, "output": r["completion"], "row": e.meta}
        assert r["completion"] == e.completion if r["source"] == "given" else oracle.ask([request]) == [True]
    assert {"own", "given"} <= {r["source"] for r in rows}
    assert rows == made(base, oracle, retries=2, paraphrase="{prompt}{answer}\n{prompt}")


def test_matching():
    ask = lambda by, output, answer: Match(by).ask([{"output": output, "answer": answer}])[0]
    assert ask("number", "so it is 1,000.0", "1000") and not ask("number", "100", "1000") and not ask("number", "", "none")
    assert ask("text", " a  b", "a b") and not ask("text", "a b c", "a b") and ask("contains", "x a b c", "a b")
    assert ask("number", "1+2=3", "so 3") and not ask("number", "3 or 4", "3") and not ask("number", "none", "none")
    assert not ask("contains", "anything", "")


def test_in_a_recipe_and_another_judge_makes_other_rows(tmp_path):
    build = {
        "name": "own",
        "build": {
            "builder": {"data.s3ft": {"rows": {"data.lab": {"skills": ["add"], "rows": 6}}, "retries": 0, "max_new": 16}}
        },
    }
    train = {
        "name": "sft",
        "train": {"source": {"data.file": {"path": "own", "holdout": 0}}, "steps": 1, "batch": 4},
        "ledger": False,
    }
    run = tune(recipe(build, train, aides={"judge": "aides.lab_oracle"}), tmp_path / "run")
    first = run.json["steps"][0]["key"]
    assert (
        first
        != tune(recipe(build, train, aides={"judge": {"aides.match": {"by": "number"}}}), tmp_path / "run", resume=True).json[
            "steps"
        ][0]["key"]
    )
    lines = (run.folder / "steps" / "own" / "data.jsonl").read_text().splitlines()
    assert len(lines) == 6 and all({"prompt", "completion", "source", "nll"} <= json.loads(x).keys() for x in lines)
    with pytest.raises(UserError, match="aide"):
        tune(recipe(build, train), tmp_path / "none")
