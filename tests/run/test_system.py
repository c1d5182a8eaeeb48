"""A run that ends with an inference system is that system for every verb that asks or measures a model."""

import json

import pytest

import temperament as tp
from temperament import cli
from temperament.bases.load import load
from temperament.bases.worlds import skill

PROMPTS = [q.prompt for q in skill("reverse").items("test", 4)] + ["The sum of a list is"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPERAMENT_CACHE", str(tmp_path / "cache"))


def run(folder, *inference, base="lab/lm", **train):
    """A run with these parts, and with a step of training where one is described."""
    source = {"data.lab": {"skills": ["shift"], "rows": 32}}
    steps = [{"name": "sft", "train": {"source": source, "steps": 1, "batch": 4, **train}}] if train else []
    suites = [{"evaluate.lab": {"target": "add", "retained": ["reverse"]}}]
    measured = {"suites": suites, "items": 6, "keep": False, "batch": 6, "diagnose": []}
    document = {"base": base, "check": False, "steps": steps, "inference": list(inference), "evaluation": measured}
    return tp.tune(document, folder, report=False)


def said(model, prompts=PROMPTS, **how):
    return [o["text"] for one in tp.generate(model, prompts, max_new=12, **how) for o in one["outputs"]]


EFT = {"decode.eft": {"tuned": "lab/lm-instruct", "reference": "lab/lm"}}


def test_an_emulated_tuning_of_the_base_itself_speaks_as_the_tuned_model(tmp_path):
    run(tmp_path / "a", EFT)
    assert said(tmp_path / "a") == said("lab/lm-instruct") != said("lab/lm")
    sharper = said(tmp_path / "a", n=2, temperature=0.7, top_p=0.9, seed=3)
    assert sharper == said("lab/lm-instruct", n=2, temperature=0.7, top_p=0.9, seed=3)
    chat = [[{"role": "user", "content": "Copy a b c."}]]
    assert said(tmp_path / "a", chat) == said("lab/lm-instruct", chat)


def test_prompts_and_answers_are_translated_and_so_are_stops(tmp_path):
    part = {"decode.conjugate_prompt": {"form": "swapcase"}}
    swapped = lambda text: text.swapcase() if text.isascii() else text
    run(tmp_path / "a", part)
    plain = said("lab/lm", [swapped(p) for p in PROMPTS])
    assert said(tmp_path / "a") == [swapped(t) for t in plain]
    stop = next(c for c in plain[-1] if c.isalpha())
    expected = said("lab/lm", [swapped(PROMPTS[-1])], stop=[stop])
    assert said(tmp_path / "a", PROMPTS[-1:], stop=[stop.swapcase()]) == [swapped(t) for t in expected]


@pytest.mark.parametrize("trained", [False, True])
def test_eval_tells_the_base_alone_from_the_system(tmp_path, trained):
    more = {"trainable": "select.full", "optimizer": {"optim.adamw": {"lr": 1e-2}}} if trained else {}
    made = run(tmp_path / "a", {"decode.repetition_penalty": {"penalty": 3.0}}, **more)
    suite = '{evaluate.lab: {target: add, retained: [reverse]}}'
    found = tp.evaluate(tmp_path / "a", [suite], items=6, batch=6)
    rows = {r["name"]: r for r in found["ledger"]["skills"]}
    for skill_ in made.json["ledger"]["skills"]:
        assert rows[skill_["name"]]["after"] == skill_["after"]
    alone = {s["name"]: s["value"] for s in tp.evaluate("lab/lm", [suite], items=6, batch=6)["skills"]}
    assert {n: r["before"] for n, r in rows.items()} == alone
    assert "ledger" in tp.evaluate(made, [suite], items=6, batch=6)


def test_chat_and_generate_on_the_command_line(tmp_path, capsys, monkeypatch):
    import io

    run(tmp_path / "a", EFT)
    heard = []
    for model in (str(tmp_path / "a"), "lab/lm-instruct"):
        monkeypatch.setattr("sys.stdin", io.StringIO("Copy a b c.\nHow are you?\n"))
        assert cli.main(["chat", model, "--max-new", "12", "--json"]) == 0
        heard.append([m["content"] for m in json.loads(capsys.readouterr().out)["messages"]])
        assert cli.main(["generate", model, "--prompt", "reverse: a b c =", "--max-new", "8", "--json"]) == 0
        heard[-1].append(json.loads(capsys.readouterr().out)["completions"][0]["outputs"][0]["text"])
    assert heard[0] == heard[1]


def test_a_base_taken_up_again_has_no_parts_of_the_run_before(tmp_path):
    base = load("lab/lm")
    document = {"base": "lab/lm", "inference": [EFT], "evaluation": {"keep": False, "items": 2}}
    made = tp.tune(document, tmp_path / "a", base=base, report=False)
    assert said(made) == said("lab/lm-instruct")
    base.reset()
    assert said(base) == said("lab/lm")
