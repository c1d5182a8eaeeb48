"""Two turns: what each row holds, against a conversation put together by hand; the bonus; the same words everywhere; a kill."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch

from temperament.bases import worlds
from temperament.bases.load import load
from temperament.engine.encode import encode
from temperament.engine.examples import Prompt
from temperament.engine.responses import read_prompts
from temperament.engine.tokens import Sampling, end_tokens, generate
from temperament.engine.turns import INSTRUCTION, Again
from temperament.errors import UserError
from temperament.methods.data.corrections import Corrections
from temperament.methods.data.lab import LabData
from temperament.methods.decode.second_turn import APART, SecondTurn
from temperament.methods.rewards.lab import LabOracle
from temperament.methods.rewards.number import Number
from temperament.methods.rollout.two_turn import TwoTurn
from temperament.methods.select.full import Full
from temperament.nn.logprobs import label, score
from temperament.run.recipe import read
from temperament.run.training import build_players
from temperament.run.tune import tune
from tests.methods.drive import fresh
from tests.resuming import killed_and_resumed, recipe, same_to_the_bit
from tests.train.rows import context, spec

ADD = worlds.skill("add")
AGAIN = "\nOnce more:\n{prompt}"


@pytest.fixture(scope="module")
def base():
    return load("lab/lm@half")


def opened(base, seed, **options):
    part = TwoTurn(LabData(["add"], rows=5), [LabOracle()], group=2, again=AGAIN, max_new=5, **options)
    ctx = context(base, seed=seed, batch=12)
    player = build_players(spec(source=part, trainable=[Full()], batch=12), ctx)[0]
    return part.open(ctx), player


def test_rows_are_conversations(base):
    seed, alpha, gamma = fresh(), 3.0, 0.5
    stream, player = opened(base, seed, alpha=alpha, gamma=gamma)
    tok, ends = base.tokenizer, end_tokens(base.model)
    words = lambda text: tok(text, add_special_tokens=False)["input_ids"]
    for step in (0, 3):
        got = stream.batch(step)
        t, n = got.tokens, len(got) // 2
        assert got.turn.tolist() == [0] * n + [1] * n
        ids = lambda i, own: t.ids[i][t.mask[i] & ((t.weights[i] != 0) == own)].tolist()  # noqa: B023
        marks = []
        for i in range(n):
            prompt = stream.prompts[int(got.group[i]) % 5]  # (over an epoch's end one may come twice)
            x1, y1, x2, y2 = ids(i, False), ids(i, True), ids(i + n, False), ids(i + n, True)
            said = y1[:-1] if y1[-1] in ends else y1
            assert x1 == prompt.ids
            assert x2 == [*x1, *said, *words("\nOnce more:\n"), *x1[1:]], seed
            assert int(got.group[i + n] - got.group[i]) == 5 * (int(got.group[:n].max()) // 5 + 1)
            assert bool((t.weights[i][len(x1) : len(x1) + len(y1)] == 1).all())  # the answer, and nothing but it
            marks.append([float(ADD.check(prompt.meta["item"], tok.decode(y, skip_special_tokens=True))) for y in (y1, y2)])
        first, second = torch.tensor(marks).T
        assert torch.allclose(got.rewards, torch.cat([first + gamma * second, second + alpha * (second - first)]))
        told = stream.feedback([got], {})
        assert told["right_1"] == pytest.approx(float(first.mean())) and told["right_2"] == pytest.approx(float(second.mean()))
        assert told["mended"] - told["spoiled"] == pytest.approx(told["right_2"] - told["right_1"])
        with torch.no_grad():
            assert torch.allclose(score(base.model, t, label())["label"], got.behaviour, atol=1e-3)
        again = stream.batch(step)
        assert torch.equal(t.ids, again.tokens.ids) and torch.equal(got.rewards, again.rewards)
    player.live.close()


def test_the_bonus_pays_for_mending_and_takes_for_spoiling(base, monkeypatch):
    stream, player = opened(base, 1, alpha=7.0)
    table = [*itertools.product((0.0, 1.0), repeat=2), (0.0, 1.0), (1.0, 0.0)]
    marks = iter([[a for a, _ in table], [b for _, b in table]])
    monkeypatch.setattr(stream, "_marks", lambda spec, numbers, made: next(marks))
    got = stream.batch(0)
    bonus = got.rewards[6:] - torch.tensor([b for _, b in table])
    assert bonus.tolist() == [0.0, 7.0, -7.0, 0.0, 7.0, -7.0] and float(bonus.sum()) == 0  # as many are right: no gain
    assert got.rewards[:6].tolist() == [a for a, _ in table]
    player.live.close()


def test_messages_as_their_template_would_write_them():
    instruct = load("lab/lm-instruct")
    tok, ends = instruct.tokenizer, end_tokens(instruct.model)
    say = lambda role, text: {"role": role, "content": text}
    ids = lambda *messages: encode(Prompt(list(messages)), tok).ids
    asked, answer = say("user", "What is 12 plus 30?"), "It is 43"
    y1 = tok(answer, add_special_tokens=False)["input_ids"]
    want = ids(asked, say("assistant", answer), say("user", INSTRUCTION))
    again = Again(tok, AGAIN)
    assert again.prompt(ids(asked), y1, ends) == again.prompt(ids(asked), [*y1, ends[-1]], ends) == want


def test_decoding_is_the_same_second_turn(base):
    part, again = SecondTurn(again=AGAIN), Again(base.tokenizer, AGAIN)
    prompts = [encode(Prompt(i.prompt), base.tokenizer).ids for i in ADD.items("test", 7, fresh() % 99)]
    for temperature in (0.0, 1.0):
        sampling = Sampling(5, temperature)
        models, how = {"model": base.model}, {"seed": 3, "batch": 3}
        first = generate(models, prompts, sampling, **how)
        then = [again.prompt(x, y, end_tokens(base.model)) for x, y in zip(prompts, first.ids, strict=True)]
        second = generate(models, then, sampling, examples=[APART + i for i in range(7)], **how)
        got = part.loop(models, prompts, sampling, hooks=part.hooks(base), **how)
        assert got.ids == second.ids and got.tokens == first.tokens + second.tokens


def test_second_answers_are_other_draws_than_first_ones(base):
    """Of a model that hears nothing: the same draws would say the same words."""
    model = copy.deepcopy(base.model)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    part, prompts = SecondTurn(again=AGAIN), [encode(Prompt("a"), base.tokenizer).ids] * 4
    models, sampling, how = {"model": model}, Sampling(8, 1.0), {"seed": fresh(), "eos": ()}
    first = generate(models, prompts, sampling, **how)
    second = part.loop(models, prompts, sampling, hooks=part.hooks(base), **how)
    assert all(a != b for a, b in zip(first.ids, second.ids, strict=True))


def test_corrections_are_rows_of_the_same_words(base):
    rows = LabData(["add"], rows=9)
    ctx = context(base)
    prompts = {p.prompt: p for p in read_prompts(rows.examples(ctx), ctx)}
    made = list(Corrections(rows, [LabOracle()], again=AGAIN, max_new=5, samples=2).make(ctx))
    wrong = [r for r in Corrections(rows, [LabOracle()], "wrong", AGAIN, samples=2, max_new=5).make(ctx) if "completion" in r]
    assert len(made) == 18 and wrong == [r for r in made if not r["right_1"]] and 0 < len(wrong) < 18
    again, tok = Again(base.tokenizer, AGAIN), base.tokenizer
    for r in made:
        text, rest = r["prompt"].split("\nOnce more:\n")
        p = prompts[rest]
        assert r["completion"] == p.meta["answer"] and text.startswith(rest)
        assert r["right_1"] == float(ADD.check(p.meta["item"], text[len(rest) :]))
        x2 = again.prompt(p.ids, tok(text[len(rest) :], add_special_tokens=False)["input_ids"])
        assert encode(Prompt(r["prompt"]), tok).ids == x2
    chat = Corrections(rows).second([{"role": "user", "content": "q"}], "a")
    assert [m["role"] for m in chat] == ["user", "assistant", "user"] and chat[-1]["content"] == INSTRUCTION


def test_a_first_answer_with_part_of_the_mark_is_wrong(base):
    ctx = context(base)
    kept = lambda partial: [
        r
        for r in Corrections(LabData(["add"], rows=9), [Number(partial=partial)], "wrong", AGAIN, max_new=5).make(ctx)
        if "completion" in r
    ]
    without, partly = kept(0.0), kept(0.1)
    assert [r["prompt"] for r in partly] == [r["prompt"] for r in without] and partly
    assert {r["right_1"] for r in partly} <= {0.0, 0.1} and any(r["right_1"] for r in partly)


def test_what_cannot_be_is_said(base):
    rows = LabData(["add"], rows=5)
    with pytest.raises(UserError, match="two turns of a group"):
        TwoTurn(rows, [LabOracle()], group=4).open(context(base, batch=12))
    for bad in ({"group": 1}, {"temperature": 0.0}, {"weights": [1.0, 2.0]}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TwoTurn(rows, [LabOracle()], **bad)
    with pytest.raises(ValueError, match="wrong"):
        Corrections(rows, first="wrong")


def test_killed_in_either_phase_it_goes_on_to_the_same_bits(tmp_path):
    rows = {"data.lab": {"skills": ["add"], "rows": 12}}
    asked = {"prompts": rows, "rewards": ["rewards.lab"], "group": 2, "max_new": 4}
    train = {"steps": 2, "batch": 8, "save": {"steps": 1}, "optimizer": {"optim.adamw": {"lr": 1e-4}}}
    phase = lambda name, alpha, credit, beta: {"name": name, "ledger": alpha > 0, "train": {
        "source": {"rollout.two_turn": {**asked, "alpha": alpha}},
        "objective": {"objectives.policy.score": {"credit": credit, "beta": beta}}, **train}}  # fmt: skip
    document = recipe(
        phase("one", 0.0, [0.0, 1.0], [0.1, 0.01]), phase("two", 2.0, [1.0, 1.0], [0.01, 0.01]), base="lab/lm@half"
    )
    whole, resumed = killed_and_resumed(document, tmp_path, kills=[1, 2])
    assert same_to_the_bit(whole, resumed)
    log = [json.loads(line) for line in (whole.folder / "log.jsonl").read_text().splitlines()]
    assert all({"right_1", "right_2", "mended", "spoiled"} <= row.keys() for row in log if "loss" in row)


def test_the_system_is_measured_by_its_second_answers(base, tmp_path):
    part, look = {"decode.second_turn": {"again": AGAIN}}, {"name": "look", "measure": True}
    run = tune(recipe(look, inference=[part], base="lab/lm@half"), tmp_path / "run")
    found = json.loads((run.folder / "steps" / "look" / "outcomes.json").read_text())["outcomes"]
    items = ADD.items("test", 4)
    prompts = [encode(Prompt(i.prompt), base.tokenizer).ids for i in items]
    twice, longest = SecondTurn(again=AGAIN), max(len(base.tokenizer(i.answer)["input_ids"]) for i in items)
    made = twice.loop({"model": base.model}, prompts, Sampling(longest + 4), hooks=twice.hooks(base))
    want = [base.tokenizer.decode(ids, skip_special_tokens=True) for ids in made.ids]
    assert [o["output"] for o in found if o["skill"] == "add"] == want


def test_the_preset_is_a_recipe():
    steps = {s.name: s for s in read("recipes/score.yaml").steps}
    one, two = steps["hold"].train, steps["both"].train
    assert one.objective.credit == [0.0, 1.0] and one.objective.beta[0] > two.objective.beta[0] and two.source.alpha > 0
    assert one.source.again == two.source.again == steps["pairs"].build.builder.again
