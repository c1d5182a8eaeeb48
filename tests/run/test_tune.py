"""Whole runs on the embedded base: chains, branches, rounds, and a folder from which nothing is done twice."""

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import seed, write_rows

from temperament.bases.load import load
from temperament.delta import Delta
from temperament.errors import UserError, WorkFailed
from temperament.run import steps as doing
from temperament.run.recipe import read
from temperament.run.skills import Skills, skills_of
from temperament.run.tune import tune

SUITE = [{"evaluate.lab": {"target": "shift", "retained": ["copy", "add"], "items": 3}}]
TWO = [{"evaluate.lab": {"target": t, "retained": ["copy"], "items": 3}} for t in ("shift", "interleave")]
LORA = {"adapters.lora": {"rank": 2}}


@pytest.fixture(scope="module")
def base():
    return load("lab/lm")


@pytest.fixture(autouse=True)
def light(tmp_path_factory, monkeypatch):
    """A cache of our own; no plan (a dry run that its own tests cover) and no waiting for the disk."""
    monkeypatch.setenv("TEMPERAMENT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr("temperament.run.plan.plan", lambda recipe, base: {})
    monkeypatch.setattr("os.fsync", lambda file: None)


def lab(skill="shift", rows=16, **more):
    return {"data.lab": {"skills": [skill], "rows": rows, **more}}


def train(name, skill="shift", steps=2, **more):
    step = {k: more.pop(k) for k in ("start", "ledger", "when") if k in more}
    spec = {
        "source": lab(skill),
        "steps": steps,
        "batch": 4,
        "trainable": [LORA],
        "optimizer": {"optim.adamw": {"lr": 1e-3}},
        **more,
    }
    return {"name": name, "train": spec, **step}


def recipe(*steps, suites=SUITE, **more):
    evaluation = {"keep": False, "suites": suites, "diagnose": [], **more.pop("evaluation", {})}
    return {"base": "lab/lm", "check": False, "steps": list(steps), "evaluation": evaluation, **more}


def cached(run) -> dict[str, bool]:
    return {s["name"]: s["cached"] for s in run.json["steps"]}


def logged(run, stage=None) -> list[dict]:
    rows = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    return [r for r in rows if stage in (None, r["stage"])]


def change(run) -> dict[str, torch.Tensor]:
    known = dict(run.base.parameters())
    return {n: run.delta.change(n).apply(known[n].detach()).clone() for n in run.delta.changes}


# ---- chains
# -----------------------------------------------------------------------------------------------------------------------


def test_sft_then_dpo_then_grpo_and_nothing_twice(base, tmp_path):
    steps = [
        train("sft"),
        train("dpo", source=lab(pairs=True), objective="objectives.preference.dpo"),
        train(
            "grpo",
            batch=4,
            source={"rollout.sample": {"prompts": lab(), "rewards": ["rewards.lab"], "group": 2, "max_new": 4}},
            objective={"objectives.policy.grpo": {"beta": 0.1}},
        ),
    ]
    spec = recipe(*steps, evaluation={"diagnose": ["diagnose.intruder_dimensions"]})
    run = tune(spec, tmp_path / "r", base=base)
    assert list(run.ledger.rows) == ["base", "sft", "dpo", "grpo"] and run.json["status"] == "done"
    assert logged(run, "dpo")[0]["terms"]["margin"] == 0  # its reference is the SFT model: at its first step nothing has moved
    assert [r["step"] for r in logged(run)] == [1, 2] * 3 and all(isinstance(r["loss"], float) for r in logged(run))
    digests = [json.loads((run.folder / "steps" / s / "artefact.json").read_text())["digest"] for s in ("sft", "dpo", "grpo")]
    assert len(set(digests)) == 3 and digests[-1] == run.json["delta"]["digest"] == run.delta.digest
    assert all(c.rank == 6 for c in run.delta.changes.values())  # low rank on low rank stays low rank

    tokens = sum(r["tokens"] for r in logged(run))

    again = tune(spec, tmp_path / "r", base=base, resume=True)  # a finished run: nothing to do
    assert all(cached(again).values()) and again.delta.digest == run.delta.digest and again.json["ledger"] == run.json["ledger"]
    before = logged(again)
    later = tune(recipe(*steps[:2], train("grpo", "copy")), tmp_path / "r", base=base)  # edit the last step only
    assert cached(later) == {"sft": True, "dpo": True, "grpo": False} and later.delta.digest != run.delta.digest
    assert len(logged(later, "grpo")) == 2 and [r for r in before if r["stage"] != "grpo"] == [
        r for r in logged(later) if r["stage"] != "grpo"
    ]

    # the folder is what scripts are promised
    json_, folder = run.json, tmp_path / "r"
    assert {"status", "base", "steps", "ledger", "delta", "plan", "cost", "environment", "recipe"} <= set(json_)
    assert {"parameters", "bytes", "digest"} <= set(json_["delta"]) and {"seconds", "peak_bytes", "tokens"} <= set(
        json_["cost"]
    )
    assert json_["cost"]["tokens"] == again.json["cost"]["tokens"] == tokens > 0 and json_["base"]["sha256"] == base.sha256
    for skill in json_["ledger"]["skills"]:
        assert {"name", "role", "metric", "n", "before", "after", "change", "ci95", "kept", "gained", "lost"} <= set(skill)
    assert {"recipe.yaml", "run.json", "log.jsonl", "delta", "steps", "items.json"} <= {p.name for p in folder.iterdir()}
    assert (folder / "delta" / "adapter_config.json").exists()
    stored = Delta.load(folder / "delta")
    known = dict(base.parameters())
    for n, want in change(later).items():
        assert torch.allclose(stored.change(n).apply(known[n].detach()), want, atol=1e-5)


@pytest.mark.parametrize("trainable", [["select.half"], [LORA], ["select.half", LORA]], ids=["half", "lora", "half+lora"])
def test_equal_recipe_and_seed_give_equal_bits(base, tmp_path, trainable):
    s = seed()
    spec = lambda s, **o: recipe(
        train("a", trainable=trainable, ledger=False),
        train("b", trainable=trainable, ledger=False, **o),
        seed=s,
        evaluation={"base": False},
    )
    one, two = tune(spec(s), tmp_path / "a", base=base), tune(spec(s, micro=1, save={"steps": 1}), tmp_path / "b", base=base)
    other = tune(spec(s + 1), tmp_path / "c", base=base)
    assert one.delta.names == two.delta.names and one.delta.digest != other.delta.digest
    assert one.json["steps"][1]["key"] == two.json["steps"][1]["key"]  # how it is split and saved is no other result
    assert all(torch.allclose(a, b, atol=2e-4) for a, b in zip(change(one).values(), change(two).values(), strict=True))
    assert tune(spec(s), tmp_path / "d", base=base).delta.digest == one.delta.digest
    if trainable == ["select.half"]:  # the half is drawn anew for each stage
        first = Delta.load(tmp_path / "a" / "steps" / "a" / "delta").names
        assert set(first) < set(one.delta.names)


def test_a_step_after_another_kind_of_step_keeps_both(base, tmp_path):
    """Full, then LoRA, then full again: the whole change is that of the last model against the pure base."""
    run = tune(
        recipe(
            train("a", trainable="select.half", ledger=False),
            train("b", ledger=False),
            train("c", trainable={"select.full": {"only": ["mlp"]}}, ledger=False),
            evaluation={"base": False},
        ),
        tmp_path / "r",
        base=base,
    )
    a, b, c = (Delta.load(tmp_path / "r" / "steps" / s / "delta") for s in "abc")
    q = "lm/model.layers.0.self_attn.q_proj.weight"
    W = dict(base.parameters())[q].detach()
    assert torch.equal(b.change(q).apply(W), c.change(q).apply(W)) and not torch.equal(W, c.change(q).apply(W))
    assert set(a.names) <= set(b.names) <= set(c.names) == set(run.delta.names)
    assert not base.originals and (tmp_path / "r" / "delta" / "delta.json").exists()


# ---- branches, rounds, foreach, when
# -----------------------------------------------------------------------------------------------


def test_two_tasks_their_matrix_and_the_merge_of_two_branches(base, tmp_path):
    merge = {"name": "both", "merge": {"method": "merge.linear"}, "start": "base"}
    spec = recipe(train("A", "shift"), train("B", "interleave", start="base"), merge, suites=TWO)
    run = tune(spec, tmp_path / "r", base=base)
    matrix = run.ledger.matrix
    assert matrix["rows"] == ["base", "A", "B", "both"] and matrix["learned"] == {"shift": "A", "interleave": "B"}
    back = matrix["backward_transfer"]
    scores = run.ledger.rows
    gain = [scores["both"][s].mean - scores[row][s].mean for s, row in (("shift", "A"), ("interleave", "B"))]
    assert back["value" if "value" in back else "change"] == pytest.approx(sum(gain) / 2)
    W, d = dict(base.parameters()), {n: Delta.load(tmp_path / "r" / "steps" / n / "delta") for n in ("A", "B")}
    for n, w in change(run).items():
        want = W[n].detach() + sum(0.5 * (d[k].change(n).apply(W[n].detach()) - W[n].detach()) for k in "AB")
        assert torch.allclose(w, want, atol=1e-6)
    more = run.json["steps"][-1]["synergy"]
    assert set(more) == {"shift", "interleave", "copy"} and all(len(m["parents"]) == 2 for m in more.values())
    shift = scores["both"]["shift"].mean - (scores["A"]["shift"].mean + scores["B"]["shift"].mean) / 2
    assert more["shift"]["synergy"] == pytest.approx(shift)
    # a branch that changes changes the merge; another name for it is not looked for
    later = tune(
        recipe(train("A", "shift", steps=3), train("B", "interleave", start="base"), merge, suites=TWO),
        tmp_path / "r",
        base=base,
    )
    assert cached(later) == {"A": False, "B": True, "both": False} and later.delta.digest != run.delta.digest
    assert later.ledger.matrix["learned"] == matrix["learned"]
    outside = recipe({"name": "m", "merge": {"method": "merge.linear", "of": [str(tmp_path / "r")]}}, suites=TWO)
    one = tune(outside, tmp_path / "m", base=base)
    assert one.ledger.matrix["rows"] == ["base", str(tmp_path / "r"), "m"]  # a source from elsewhere has its row too
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(change(one).values(), change(later).values(), strict=True))
    tune(spec, tmp_path / "r", base=base)  # the folder now holds another change
    assert cached(tune(outside, tmp_path / "m", base=base)) == {"m": False}


def test_every_stage_has_draws_of_its_own_after_a_merge_too(base, tmp_path, monkeypatch):
    """Of a merge of later stages, and of one whose models come from elsewhere."""
    seeds, real = {}, doing.run_train

    def seen(spec, ctx, folder, name, *more):
        seeds[name] = ctx.seed
        return real(spec, ctx, folder, name, *more)

    monkeypatch.setattr(doing, "run_train", seen)
    merging = lambda name, *of: {"name": name, "merge": {"method": "merge.linear", "of": list(of)}, "ledger": False}
    one = lambda name, **o: train(name, steps=1, ledger=False, **o)
    tune(recipe(one("z"), evaluation={"base": False}), tmp_path / "else", base=base)
    made = [one("a"), one("b"), one("c", start="a"), merging("both", "b", "c"), one("d")]
    far = merging("far", str(tmp_path / "else"))
    run = tune(recipe(*made, far, one("e"), evaluation={"base": False}), tmp_path / "run", base=base)
    assert seeds["z"] == seeds["a"] == run.recipe.seed != seeds["e"] and run.state.stage == 2
    assert len({seeds[n] for n in "acd"}) == 3  # c begins where a ended, d where a, b and c are merged


def test_rounds_stop_by_their_rule_and_begin_where_they_say(base, tmp_path):
    inner = [train("x"), {"train": {**train("")["train"], "steps": 1}, "start": "x"}]
    run = tune(
        recipe({"name": "r", "rounds": {"times": 3, "steps": inner, "until": {"gains_less": 0.9}}}), tmp_path / "a", base=base
    )
    assert list(cached(run)) == ["r/1/x", "r/1/train-2"]  # compared with the base: the first round gained less
    assert (tmp_path / "a" / "steps" / "r.1.x" / "delta").is_dir()
    run = tune(
        recipe({"name": "r", "rounds": {"times": 3, "steps": inner, "until": {"above": 0.0}}}, train("after", start="r")),
        tmp_path / "a",
        base=base,
    )
    assert cached(run) == {"r/1/x": True, "r/1/train-2": True, "after": False}
    for start in ("previous", "base", "start"):
        steps = [
            train("before", ledger=False),
            {"name": "r", "rounds": {"times": 2, "start": start, "steps": [train("x", ledger=False)]}},
        ]
        run = tune(recipe(*steps, evaluation={"base": False}), tmp_path / start, base=base)
        rank = {c.rank for c in run.delta.changes.values()}
        assert rank == {{"previous": 6, "base": 2, "start": 4}[start]} and list(cached(run)) == ["before", "r/1/x", "r/2/x"]
        assert len({s["key"] for s in run.json["steps"][1:]}) == 2  # no round is taken for another
        digest = {json.loads(p.read_text())["digest"] for p in (tmp_path / start / "steps").glob("r.*/artefact.json")}
        assert len(digest) == 2


def test_what_was_built_is_read_from_any_start(base, tmp_path):
    """Rows do not hang on the weights a step begins with; and inside a foreach a step goes by its own name."""
    rows = {"data.self_play": {"rows": lab(), "take": 4, "max_new": 2, "temperature": 1.0}}
    play = {"source": {"data.file": {"path": "pairs", "holdout": 0}}, "objective": "objectives.preference.dpo"}
    inner = [{"name": "pairs", "build": {"builder": rows}}, train("play", steps=1, start="base", ledger=False, **play)]
    each = {"name": "each", "foreach": {"values": {"k": [1, 2]}, "steps": inner}}
    run = tune(recipe(each, evaluation={"base": False}), tmp_path / "r", base=base)
    assert list(cached(run)) == ["each.1.pairs", "each.1.play", "each.2.pairs", "each.2.play"]


def test_full_memory_is_a_sentence_that_says_what_to_set(base, tmp_path, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("temperament.run.steps.run_train", full)
    with pytest.raises(WorkFailed, match=r"memory .* is full; set micro: 1 .*--resume"):
        tune(recipe(train("sft"), evaluation={"base": False}), tmp_path / "r", base=base)
    assert json.loads((tmp_path / "r" / "run.json").read_text())["status"] == "failed"


def test_foreach_when_and_measure(base, tmp_path):
    each = {
        "name": "f",
        "foreach": {
            "values": {"s": ["shift", "copy"]},
            "steps": [{"train": {**train("")["train"], "source": lab("{s}")}, "ledger": False}],
        },
    }
    never = train("never", when={"skill": "target", "above": 2.0})
    run = tune(
        recipe(
            each,
            never,
            {"measure": True},
            train("more", start="f", ledger=False),
            {"merge": {"method": "merge.linear"}, "name": "m"},
        ),
        tmp_path / "r",
        base=base,
    )
    assert list(cached(run)) == ["f.1.train-1", "f.2.train-1", "measure-3", "more", "m"] and list(run.ledger.rows) == [
        "base",
        "measure-3",
        "m",
    ]
    parts_ = [Delta.load(tmp_path / "r" / "steps" / n / "delta") for n in ("f.1.train-1", "f.2.train-1", "more")]
    n = parts_[0].names[0]
    W = dict(base.parameters())[n].detach()
    want = sum((d.change(n).apply(W) - W) for d in parts_) / 3  # each result once, whatever leads to it
    assert torch.allclose(change(run)[n] - W, want, atol=1e-6)
    with pytest.raises(UserError, match=r"never.when.skill.*targte.*target"):
        tune(recipe(train("never", when={"skill": "targte", "below": 1.0})), tmp_path / "w", base=base)


def test_nothing_trained_but_an_inference_slot(base, tmp_path):
    run = tune(recipe(inference=[{"decode.repetition_penalty": {"penalty": 8.0}}]), tmp_path / "r", base=base)
    assert list(run.ledger.rows) == ["base", "inference"] and run.delta is None and run.json["status"] == "done"
    output = lambda row: [o.output for o in run.ledger.rows[row]["copy"].outcomes]
    assert output("base") != output("inference")
    plain = tune(recipe(), tmp_path / "p", base=base)
    assert [o.output for o in plain.ledger.rows["base"]["copy"].outcomes] == output("base") and list(plain.ledger.rows) == [
        "base"
    ]


def test_no_steps_and_no_data(base, tmp_path):
    run = tune(recipe(train("a", steps=0, trainable="select.full")), tmp_path / "r", base=base)
    assert run.json["delta"]["parameters"] == 0 and all(s["change"] == 0 for s in run.json["ledger"]["skills"])
    path = write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError, match=r"empty\.jsonl"):
        tune(recipe(train("a", source={"data.file": {"path": path}})), tmp_path / "e", base=base)


# ---- what is kept, and what is looked at
# ---------------------------------------------------------------------------------------------


def test_best_is_the_best_look(base, tmp_path, monkeypatch):
    """Looks of a fake skill that is best in the middle: the step leaves what it was there, also where it went on from a
    checkpoint."""
    values = {1: 0.1, 2: 0.6, 3: 0.2, 4: 0.6}
    state = {"n": 0}

    def look(self, items, watched=None):
        state["n"] += 1
        return {"target": values[state["n"]]}

    monkeypatch.setattr(Skills, "look", look)
    spec = lambda steps, **o: recipe(
        train("a", steps=steps, optimizer={"optim.sgd": {"lr": 0.1}}, ledger=False, save={"steps": 1}, **o),
        evaluation={"base": False, "every": 1},
    )
    best = tune(spec(4, keep="best"), tmp_path / "best", base=base)
    state["n"] = 0
    assert (
        change(best) and best.delta.digest == tune(spec(2), tmp_path / "two", base=base).delta.digest
    )  # a tie keeps the first
    assert [r["skills"]["target"] for r in logged(best) if "skills" in r] == [0.1, 0.6, 0.2, 0.6]
    seen = []

    def stop(event, **data):
        seen.append(event)
        if event == "look" and data["step"] == 4 and "stopped" not in seen:
            seen.append("stopped")
            raise KeyboardInterrupt

    state["n"] = 0
    with pytest.raises(Exception, match="resume"):
        tune(spec(4, keep="best"), tmp_path / "again", base=base, tell=stop)
    state["n"] = 3
    resumed = tune(spec(4, keep="best"), tmp_path / "again", base=base, resume=True)
    assert resumed.delta.digest == best.delta.digest and logged(resumed)[-1]["step"] == 4
    assert [(r["step"], "skills" in r) for r in logged(resumed)] == [(r["step"], "skills" in r) for r in logged(best)]
    assert not any("_pieces" in m.__dict__ for m in base.model.modules())


def test_a_stop_looks_the_right_way(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Skills, "look", lambda self, live, items, watched=None: {"target": 0.7, "text": 0.7})
    for skill, reach, less, steps in (
        ("target", 0.6, set(), 1),
        ("target", 0.8, set(), 3),
        ("text", 0.6, {"text"}, 3),
        ("text", 0.8, {"text"}, 1),
    ):
        monkeypatch.setattr(Skills, "less", lambda self, less=less: less)
        spec = recipe(
            train("a", steps=3, ledger=False, stop={"skill": skill, "reach": reach, "every": 1}),
            suites=[*SUITE, {"evaluate.lab": {"retained": ["text"], "items": 2}}],
            evaluation={"base": False},
        )
        run = tune(spec, tmp_path / f"{skill}{reach}", base=base)
        assert run.json["steps"][0]["steps"] == steps and bool(run.json["steps"][0]["stopped"]) == (steps == 1)


def test_ema_is_the_mean_from_the_start(base, tmp_path):
    spec = lambda steps, **o: recipe(
        train(
            "a",
            steps=steps,
            trainable={"select.full": {"only": ["norm"]}},
            optimizer={"optim.sgd": {"lr": 0.5}},
            clip=None,
            ledger=False,
            **o,
        ),
        evaluation={"base": False},
    )
    one, two, ema = (
        tune(s, tmp_path / str(i), base=base) for i, s in enumerate((spec(1), spec(2), spec(2, ema=0.75, keep="ema")))
    )
    W = dict(base.parameters())
    for n, w in change(ema).items():
        first = change(one).get(n, W[n])
        assert torch.allclose(w, 0.75 * (0.75 * W[n] + 0.25 * first) + 0.25 * change(two)[n], atol=1e-6)


def test_best_may_be_read_from_the_first_update(base, tmp_path):
    """Until the first look it is the model as the step began, so a penalty to it is the penalty to `start`."""
    spec = lambda version: recipe(
        train("a", keep="best", regularizers=[{"regularizers.kl": {"version": version}}], ledger=False),
        evaluation={"base": False, "every": 5},
    )
    best, start = (tune(spec(v), tmp_path / v, base=base) for v in ("best", "start"))
    said = repr(best)
    assert str(best.folder) in said and "done" in said and "lab/lm" in said and len(said) < 2000
    assert best.delta.digest == start.delta.digest


def test_keys_follow_what_makes_a_result(base, tmp_path):
    rows = [{"prompt": f"{i} and", "completion": f" {i}"} for i in range(12)]
    path = tmp_path / "rows.jsonl"
    write_rows(path, rows)
    spec = lambda **o: recipe(
        train("a", source={"data.file": {"path": str(path)}}, ledger=False, **o.pop("train", {})),
        evaluation={"base": False},
        **o,
    )
    key = lambda s: tune(s, tmp_path / "r", base=base).json["steps"][0]["key"]
    first = key(spec())
    assert key(spec(train={"micro": 2, "save": {"seconds": 5.0}, "checkpointing": True})) == first
    others = [
        key(spec(seed=1)),
        key(spec(train={"clip": 0.5})),
        key(spec(precision={"compute": "bf16"})),
        key(spec(train={"stop": {"every": 9}})),
        key(spec(aides={"judge": "aides.match"})),
        key(spec(aides={"judge": {"aides.match": {"by": "number"}}})),
        key(spec(inference=["decode.repetition_penalty"])),
    ]
    write_rows(path, [{**r, "completion": "!" + r["completion"]} for r in rows])
    others.append(key(spec()))
    assert len({first, *others}) == 9


def test_the_keep_set_is_written_once(monkeypatch, tmp_path):
    from temperament.methods.evaluate import keep

    monkeypatch.setenv("TEMPERAMENT_CACHE", str(tmp_path))
    asked, generate = [], keep.generate
    monkeypatch.setattr(keep, "generate", lambda *a, **k: asked.append(1) or generate(*a, **k))
    small = load("lab/lm-small")
    keeping = lambda **o: {"suites": [{"evaluate.keep": {"items": 3, **o}}]}
    of = lambda **o: skills_of(read({"base": "lab/lm-small", "evaluation": keeping(**o)}), small)
    first, again = of(), of()
    assert len(asked) == 1 and first.skills[0].samples == again.skills[0].samples and first.key("x") == again.key("x")
    assert of(seed=1).skills[0].samples != first.skills[0].samples and len(asked) == 2


def test_base_scores_are_measured_once(base, tmp_path):
    told = []
    tell = lambda event, **data: told.append((event, data))
    suites = [{"evaluate.lab": {"target": "shift", "retained": ["copy"], "items": 2, "seed": seed()}}]
    for k in range(2):
        tune(recipe(train("a", ledger=False), suites=suites), tmp_path / str(k), base=base, tell=tell)
    assert [d["cached"] for e, d in told if e == "measured"] == [False, True]


def test_the_dial_and_its_choice(base, tmp_path):
    run = tune(
        recipe(
            train("a"),
            evaluation={
                "dial": {"strengths": [0.0, 0.5, 1.0], "shape": ["merge.linear", "merge.lines"], "budget": 1.0, "items": 3}
            },
        ),
        tmp_path / "r",
        base=base,
    )
    points = {(p["shape"], p["strength"]): p for p in run.json["dial"]["points"]}
    assert (
        len(points) == 6 and points["merge.linear", 0.0]["target_change"] == points["merge.linear", 0.0]["retained_change"] == 0
    )
    same = ("target", "retained", "skills")
    assert all(points["merge.linear", 1.0][k] == points["merge.lines", 1.0][k] for k in same)
    after = {s["name"]: s["after"] for s in run.json["ledger"]["skills"]}
    assert points["merge.linear", 1.0]["skills"] == pytest.approx(after)
    assert run.json["dial"]["best"]["retained_change"] >= -1.0


# ---- refusals
# ------------------------------------------------------------------------------------------------------------------------------


def test_what_is_asked_wrongly_ends_before_anything_is_trained(base, tmp_path):
    for broken, why in [
        (recipe(train("a", stop={"skill": "shfit"})), "shift"),
        (recipe(train("a", objective="objectives.preference.dpo")), "the source gives texts"),
        (recipe(train("a", trainable={"adapters.lora": {"targets": ["q_porj"]}})), "q_proj"),
        (
            recipe(train("a"), suites=[*SUITE, {"evaluate.lab": {"target": "shift", "retained": ["copy"], "items": 2}}]),
            "another `name`",
        ),
        (
            recipe(
                train(
                    "a",
                    source={"rollout.sample": {"prompts": lab(), "rewards": ["rewards.lab"], "group": 3}},
                    objective="objectives.policy.grpo",
                )
            ),
            "multiple of the group",
        ),
        (recipe({"merge": {"method": "merge.linear", "of": ["base"]}}), "must have changed the base"),
    ]:
        with pytest.raises(UserError) as problem:
            tune(broken, tmp_path / "r", base=base)
        assert why in str(problem.value)
        assert not (tmp_path / "r" / "log.jsonl").exists() or not (tmp_path / "r" / "log.jsonl").read_text()
        assert json.loads((tmp_path / "r" / "run.json").read_text())["status"] == "failed"
        assert not any("_pieces" in m.__dict__ for m in base.model.modules()) and not base.originals


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    run = tune(recipe(train("a", ledger=False), evaluation={"base": False}), tmp_path / "r", base=base)
    other = replace(run.delta, base={"lm": "0" * 64})
    other.save(tmp_path / "other")
    with pytest.raises(UserError, match="made on 000000000000"):
        tune(recipe({"merge": {"method": "merge.linear", "of": [str(tmp_path / "other")]}}), tmp_path / "m", base=base)


def test_folders_that_are_not_ours_or_unfinished(base, tmp_path, monkeypatch):
    spec = recipe(train("a", ledger=False), evaluation={"base": False})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for place, why in (("mine", "other files"), ("file", "name a folder"), ("file/below", "cannot be written")):
        with pytest.raises(UserError, match=why):
            tune(spec, tmp_path / place, base=base)
    with pytest.raises(UserError, match="leave --resume out"):
        tune(spec, tmp_path / "new", base=base, resume=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"

    def dies(event, **data):
        if event == "step" and data["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(Exception, match="--resume"):
        tune(spec, tmp_path / "r", base=base, tell=dies)
    assert json.loads((tmp_path / "r" / "run.json").read_text())["status"] == "interrupted"
    with pytest.raises(UserError, match="unfinished run; add --resume"):
        tune(spec, tmp_path / "r", base=base)
    assert tune(spec, tmp_path / "r", base=base, resume=True).json["status"] == "done"
    assert tune(spec, tmp_path / "r", base=base, fresh=True).json["steps"][0]["cached"] is False


@pytest.mark.parametrize("limit", [200, 3_000, 60_000])
def test_a_full_disk_is_a_sentence_and_the_run_goes_on_later(base, tmp_path, limit):
    """No file may grow beyond `limit` bytes: what cannot be written stops the run in one sentence, and nothing half-written is
    taken up."""
    spec = recipe(train("a", steps=6, ledger=False, save={"steps": 2}), evaluation={"base": False})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(WorkFailed) as problem:
            tune(spec, tmp_path / "r", base=base)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written" in str(problem.value) and "\n" not in str(problem.value)
    assert not list(Path(tmp_path / "r").rglob("*.part"))
    begun = (tmp_path / "r" / "run.json").exists()
    run = tune(spec, tmp_path / "r", base=base, resume=begun)
    assert run.json["status"] == "done" and run.delta.digest == tune(spec, tmp_path / "w", base=base).delta.digest


def test_trackers_are_told_what_the_log_holds(base, tmp_path, monkeypatch):
    """A tracker that only remembers, in the place of one that is not installed."""
    from accelerate import tracking

    told, ended = [], []

    class Remember(tracking.GeneralTracker):
        name, requires_logging_directory, main_process_only = "trackio", False, True
        tracker = None

        def __init__(self, run_name, **kwargs):
            super().__init__()

        def store_init_configuration(self, values):
            told.append(values)

        def log(self, values, step=None, **kwargs):
            told.append((step, values))

        def finish(self):
            ended.append(True)

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", Remember)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TRACKIO])
    recipe = {"base": "lab/lm", "log_with": "trackio", "steps": [train("sft")], "evaluation": {"suites": SUITE, "keep": False}}
    run = tune(recipe, tmp_path / "run", base=base)
    rows = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    options, losses = told[0], {step: v["sft/loss"] for step, v in told[1:] if "sft/loss" in v}
    assert options["base"] == "lab/lm" and options["steps.0.train.steps"] == 2
    assert losses == {r["step"]: r["loss"] for r in rows if "loss" in r} and len(losses) == 2
    assert [step for step, v in told[1:] if "ledger/shift" in v] == [0, 1] and ended == [True]
    for name, sentence in (("wandb", "pip install wandb"), ("wandv", "'wandb'")):
        with pytest.raises(UserError, match=sentence):
            tune(recipe | {"log_with": name}, tmp_path / name, base=base)
