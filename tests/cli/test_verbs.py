"""The verbs on a real run: a lab base, a small file, every output looked at as a script would."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from temperament import cli

SMALL = {"items": 6, "keep": False, "batch": 16, "diagnose": []}


def recipe(folder, steps=6, **train):
    data = folder / "new.jsonl"
    if not data.exists():
        from temperament.bases import worlds

        rows = worlds.skill("shift").items("train", 60, 0)
        data.write_text("".join(json.dumps({"prompt": i.prompt, "completion": i.answer}) + "\n" for i in rows))
    suite = {"evaluate.file": {"data": {"data.file": {"path": str(data)}}, "name": "shift"}}
    spec = {
        "source": {"data.file": {"path": str(data)}},
        "trainable": ["adapters.lora"],
        "optimizer": {"optim.adamw": {"lr": 1e-3}},
        "steps": steps,
        "batch": 8,
    }
    known = {"evaluate.lab": {"retained": ["copy"]}}
    document = {
        "base": "lab/lm",
        "check": False,
        "steps": [{"name": "sft", "train": spec | train}],
        "evaluation": SMALL | {"suites": [suite, known]},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def temper(*argv, **env):
    """In a process of its own, as a script runs it."""
    return subprocess.run(
        [sys.executable, "-m", "temperament.cli", *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **env},
    )


def spoken(capsys, *argv, code=0):
    got = cli.main([*map(str, argv), "--json"])
    out, err = capsys.readouterr()
    assert got == code, err
    return json.loads(out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("verbs")
    os.environ["TEMPERAMENT_CACHE"] = str(place / "cache")
    yield place
    del os.environ["TEMPERAMENT_CACHE"]


@pytest.fixture(scope="module")
def run(folder):
    """A finished run, made by the command line; its stdout and stderr."""
    path = recipe(folder)
    done = temper("tune", path, "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run", done


def test_tune_leaves_what_the_contract_says(run):
    place, done = run
    for name in ("recipe.yaml", "run.json", "report.html", "delta", "log.jsonl"):
        assert (place / name).exists(), name
    stored = json.loads((place / "run.json").read_text())
    assert stored["status"] == "done" and {"base", "steps", "ledger", "delta", "plan", "cost", "environment"} <= stored.keys()
    assert {s["name"] for s in stored["ledger"]["skills"]} == {"shift", "copy"}
    assert {"seconds", "peak_bytes", "tokens"} <= stored["cost"].keys() and len(stored["delta"]["digest"]) == 64
    assert "shift" in done.stdout and "report.html" in done.stdout and "\x1b" not in done.stdout
    assert "before" in done.stderr and "6/6" in done.stderr and "loss" in done.stderr and "\x1b" not in done.stderr


def test_an_unchanged_run_is_not_run_again(run, capsys):
    place, _ = run
    again = spoken(capsys, "tune", place / "recipe.yaml", "--out", place)
    first = json.loads((place / "run.json").read_text())
    assert all(s["cached"] for s in again["steps"]) and again["delta"]["digest"] == first["delta"]["digest"]


def test_equal_recipe_and_seed_give_an_equal_digest(run, folder, capsys):
    place, _ = run
    other = spoken(capsys, "tune", folder / "recipe.yaml", "--out", folder / "twin", "--quiet")
    assert other["delta"]["digest"] == json.loads((place / "run.json").read_text())["delta"]["digest"]
    moved = spoken(capsys, "tune", folder / "recipe.yaml", "--out", folder / "seeded", "--set", "seed=1", "--quiet")
    assert moved["delta"]["digest"] != other["delta"]["digest"] and moved["recipe"]["seed"] == 1


def test_ctrl_c_saves_and_resume_gives_the_same_bits(folder, capsys):
    path = recipe(folder, steps=400)
    whole = spoken(capsys, "tune", path, "--out", folder / "whole", "--quiet")
    broken = subprocess.Popen(
        [sys.executable, "-m", "temperament.cli", "tune", str(path), "--out", str(folder / "broken")],
        stderr=subprocess.PIPE,
        text=True,
    )
    log = folder / "broken" / "log.jsonl"
    limit = time.monotonic() + 120
    while not (log.exists() or broken.poll() is not None) and time.monotonic() < limit:
        time.sleep(0.05)
    time.sleep(0.2)
    broken.send_signal(signal.SIGINT)
    _, err = broken.communicate(timeout=120)
    recipe(folder)  # the fixture's
    assert broken.returncode == 130, err
    assert "--resume" in err.strip().splitlines()[-1] and "Traceback" not in err
    path = folder / "broken" / "recipe.yaml"
    refused = spoken(capsys, "tune", path, "--out", folder / "broken", code=2)
    assert "--resume" in refused["error"]
    resumed = spoken(capsys, "tune", path, "--out", folder / "broken", "--resume")
    assert resumed["delta"]["digest"] == whole["delta"]["digest"]


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_export(run, folder, capsys, form):
    place, _ = run
    to = folder / f"export-{form}"
    exact = ("--dtype", "fp32") if form == "merged" else ()
    made = spoken(capsys, "export", place, "--to", to, "--as", form, *exact)
    assert (to / "certificate.json").exists() and made["certificate"] and Path(made["to"]) == to
    again = spoken(capsys, "export", place, "--to", to, "--as", form, code=2)
    assert again["field"] == "--to" and "not empty" in again["error"]
    if form == "merged":
        says = [
            spoken(capsys, "generate", m, "--prompt", "copy: a b =", "--max-new", "8")["completions"][0]["outputs"][0]
            for m in (to, place)
        ]
        assert says[0]["text"] == says[1]["text"] and says[0]["logp"] == pytest.approx(says[1]["logp"], abs=1e-4)


def test_dial_answers_a_budget_and_bakes_it(run, folder, capsys):
    place, _ = run
    found = spoken(
        capsys, "dial", place, "--strengths", "0,1", "--items", "4", "--budget", "200", "--bake", folder / "baked", "--quiet"
    )
    assert [p["strength"] for p in found["points"]] == [0, 1] and found["budget"] == 200
    assert (folder / "baked" / "config.json").exists()
    assert cli.main(["dial", str(place), "--strengths", "0", "--items", "2", "--quiet"]) == 0
    assert "at strength 0" in capsys.readouterr().out


def test_diagnose_eval_merge(run, folder, capsys):
    place, _ = run
    found = spoken(capsys, "diagnose", "lab/lm", place, "--with", "{diagnose.intruder_dimensions: {k: 3}}")
    assert found["diagnoses"]["diagnose.intruder_dimensions"]["k"] == 3
    measured = spoken(capsys, "eval", place, "--suite", folder / "new.jsonl", "--items", "5", "--quiet")
    assert measured["skills"][0]["n"] == 5 and measured["ledger"]["skills"][0]["before"] is not None
    made = spoken(capsys, "merge", place, place, "--out", folder / "merged", "--as", "delta")
    assert made["base"] == "lab/lm" and (folder / "merged" / "delta.json").exists()
    few = ("--suite", "{evaluate.lab: {target: shift, retained: [copy]}}", "--items", "2", "--quiet")
    made = spoken(capsys, "merge", place, "lab/lm", "--base", "lab/lm", "--out", folder / "m2", *few)
    assert made["ledger"]["matrix"]["rows"] == ["base", Path(place).name, "lm", "merge"]
    assert set(made["synergy"]) == {"shift", "copy"}


def test_chat_answers_each_line(capsys, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n/undo\nhow are you\nand you\n/exit\nnever read\n"))
    found = spoken(capsys, "chat", "lab/lm", "--max-new", "5", "--system", "Be brief.")
    assert [m["role"] for m in found["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in found["messages"]][1::2] == ["how are you", "and you"]


def test_generate_is_addressed(capsys):
    ask = lambda *more: spoken(capsys, "generate", "lab/lm", "--prompt", "The", "--max-new", "6", *more)["completions"][0][
        "outputs"
    ]
    first, again, other = ask("--n", "3", "--seed", "1"), ask("--n", "3", "--seed", "1"), ask("--n", "3", "--seed", "2")
    assert [o["text"] for o in first] == [o["text"] for o in again] != [o["text"] for o in other]
    assert len(first) == 3 and all(1 <= o["tokens"] <= 6 and o["logp"] <= 0 for o in first)
    assert [o["text"] for o in ask("--n", "1", "--temperature", "1", "--seed", "1")] == [
        first[0]["text"]
    ]  # the batch changes nothing


def test_data_shows_tokens_and_refuses_bad_rows(folder, capsys):
    recipe(folder)
    seen = spoken(capsys, "data", folder / "new.jsonl", "--base", "lab/lm", "--n", "2")
    assert len(seen["shown"]) == 2 and seen["totals"]["trained"] > 0
    assert cli.main(["data", str(folder / "new.jsonl"), "--base", "lab/lm", "--n", "1"]) == 0
    assert "[[" in capsys.readouterr().out
    bad = folder / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    refused = spoken(capsys, "data", bad, "--base", "lab/lm", code=2)
    assert "line 2" in refused["error"]
    assert spoken(capsys, "data", bad, "--base", "lab/lm", "--skip-bad")["totals"]["bad"]


def test_new_writes_a_recipe_that_reads_back(folder, capsys, monkeypatch):
    from temperament.run import recipe as schema
    from temperament.run.new import KINDS

    monkeypatch.chdir(folder)
    for kind in KINDS:
        out = folder / f"{kind}.yaml"
        assert (
            cli.main(
                [
                    "new",
                    kind,
                    "--base",
                    "lab/lm",
                    "--data",
                    "pairs.jsonl" if kind == "dpo" else "new.jsonl",
                    "--out",
                    str(out),
                    "--steps",
                    "7",
                    "--method",
                    "select.half",
                ]
            )
            == 0
        )
        read = schema.read(out)
        assert read.steps[0].train.steps == 7 and type(read.steps[0].train.trainable[0]).part_name == "select.half"
        commented = [line for line in out.read_text().splitlines() if not line.startswith("#") and line.strip()]
        assert sum("# " in line for line in commented) > 0.9 * len(commented)
        assert yaml.safe_load(out.read_text())["steps"][0]["train"]["steps"] == 7  # plain YAML too
    assert cli.main(["new", "sft", "--base", "lab/lm", "--data", "new.jsonl", "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    for flags, wanted in (
        (["--method", "lora"], "adapters.lora"),
        (["--method", "select.hlaf"], "select.half"),
        (["--lr", "-1"], "above 0"),
        (["--steps", "1", "--epochs", "1"], "either"),
        (["--base", "lab/lx"], "lab/lm"),
    ):
        line = ["new", "sft", "--base", "lab/lm", "--data", "x.jsonl", *flags]
        assert cli.main(line) == 2 and wanted in capsys.readouterr().err
    assert cli.main(["new", "sfd", "--base", "lab/lm", "--data", "x"]) == 2 and "did you mean 'sft'?" in capsys.readouterr().err


def test_new_reads_the_rows_as_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {
        "chat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "completion": {"question": "1+1=", "answer": "2"},
        "text": {"text": "a text"},
        "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "odd": {"ask": "a", "say": "b"},
    }
    for name, row in rows.items():
        Path(f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    new = lambda kind, data, *more: spoken(capsys, "new", kind, "--base", "lab/lm", "--data", f"{data}.jsonl", *more)
    source = lambda text: yaml.safe_load(text)["steps"][0]["train"]["source"]["data.file"]
    for kind, name in (("sft", "chat"), ("kl-sft", "text"), ("dpo", "preference")):
        assert source(new(kind, name)["recipe"])["shape"] == name
    text = new("sft", "completion")["recipe"]
    assert source(text)["columns"] == {"prompt": "question", "completion": "answer"}
    assert re.search(r"^ +# alpha: null +# ", text, re.M), "options whose default is null are shown"
    mine = new("grpo", "odd", "--columns", "prompt=ask,completion=say")["recipe"]
    told = yaml.safe_load(mine)["steps"][0]["train"]["source"]["rollout.sample"]["prompts"]["data.file"]
    assert told["columns"] == {"prompt": "ask", "completion": "say"} and told["shape"] == "completion"
    # (the last line: a test before this one may have woken another library's progress bar)
    refused = lambda *line: cli.main([*line]) == 2 and capsys.readouterr().err.strip().rpartition("\n")[2]
    assert "`temper new dpo`" in refused("new", "sft", "--base", "lab/lm", "--data", "preference.jsonl")
    assert "did you mean 'sft'" in refused("new", "sftt")
    assert "OURS=THEIRS" in refused("new", "sft", "--base", "lab/lm", "--data", "odd.jsonl", "--columns", "prompt")
    hint = refused("data", "completion.jsonl", "--base", "lab/lm-small")
    assert "rename with --columns prompt=question,completion=answer" in hint
    renamed = ("--columns", "prompt=question,completion=answer")
    assert spoken(capsys, "data", "completion.jsonl", "--base", "lab/lm-small", *renamed)
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    said = refused("data", "bad.jsonl", "--base", "lab/lm-small")
    assert said.startswith("bad.jsonl, line 2: ") and "add --skip-bad" in said and "on_bad" not in said
    near = refused("eval", "lab/lm-small", "--suite", "chta.jsonl")
    assert "no such file; did you mean" in near and "'chat.jsonl'?" in near


def test_a_strength_of_nothing_and_how_close(capsys):
    from temperament.cli import dial, export
    from temperament.cli.say import Say

    certificate = {"max_difference": 3.2e-7, "dtype": "bf16", "rounding": {"max_difference": 0.012, "kl": 1e-6}}
    export.show({"to": "x", "at": {"shape": "merge.linear", "strength": 0.0}, "certificate": certificate}, Say(), None)
    out, err = capsys.readouterr()
    assert "3.2e-07" in out and "bf16" in out and "the base itself" in err
    levels = {"target": 0.1, "target_change": 0.0, "retained": 0.9, "retained_change": 0.0}
    point = {"strength": 0.0, "shape": "merge.linear", **levels}
    dial.show({"points": [point], "best": point, "budget": 1.0, "baked": "x", "certificate": certificate}, Say(), None)
    assert "the base itself" in capsys.readouterr().err


def test_diagnose_leaves_out_what_did_not_change(capsys):
    from temperament.cli import diagnose
    from temperament.cli.say import Say

    rows = [{"place": f"layer{i}", "count": 0, "relative_norm": float(i == 1)} for i in range(4)]
    data = {"delta": {"parameters": 3, "bytes": 12}, "diagnoses": {"diagnose.x": {"intruders": 0, "rows": rows}}}
    diagnose.show(data, Say(), None)
    out = capsys.readouterr().out
    assert "layer1" in out and "layer2" not in out and "3 more that did not change" in out


def test_the_pace_is_told_when_it_means_something(capsys):
    from temperament.cli.live import Live
    from temperament.cli.say import Say

    live = Live(Say())
    live.on_phase("sft")
    live.on_step("sft", 1, 100, 2.0, 9.0)
    first = capsys.readouterr().err
    assert "loss 2.000" in first and "left" not in first and "step" not in first
    live.on_step("sft", 2, 100, 2.0, 0.5)
    live.printed = -1e9
    live.on_step("sft", 3, 100, 2.0, 0.5)
    assert "2.0 steps/s" in capsys.readouterr().err, "the first step, which warms up, is not counted"


def test_adapters_learn_ten_times_faster_and_large_bases_slower():
    from temperament.run.new import rate, size_of

    assert (
        rate("sft", 1e6, 10) == 10 * rate("sft", 1e6)
        and rate("dpo", 1e9) < rate("sft", 1e9)
        and rate("sft", 70e9) < rate("sft", 1e6)
    )
    assert (
        size_of("Qwen/Qwen2.5-0.5B-Instruct") == 0.5e9 and size_of("x/SmolLM2-135M") == 135e6 and size_of("org/model") is None
    )
    assert 1e5 < size_of("lab/lm") < 1e8


def test_parts_and_doctor(capsys):
    listed = spoken(capsys, "parts")
    lora = {p["name"] for p in spoken(capsys, "parts", "LoRA")}
    assert "adapters.lora" in lora and "select.half" not in lora and len(lora) < len(listed)
    assert cli.main(["parts", "nothing like it"]) == 2 and "no part has it" in capsys.readouterr().err
    assert {"name", "room", "papers", "summary", "modalities", "options"} <= listed[0].keys()
    half = next(p for p in listed if p["name"] == "select.half")
    assert half["papers"] == ["012"] and {"type", "default", "help"} == half["options"]["share"].keys()
    assert all(p["summary"] and all(o["help"] for o in p["options"].values()) for p in listed), [
        p["name"] for p in listed if not all(o["help"] for o in p["options"].values())
    ]
    one = spoken(capsys, "part", "select.half")
    assert one == half
    assert cli.main(["part", "select.half"]) == 0 and "share" in capsys.readouterr().out
    cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] == (not found["problems"]) and found["versions"]["torch"] and all(p["mend"] for p in found["problems"])


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"base": "no/such/folder"}, "base"),
        ({"stesp": []}, "did you mean 'steps'?"),
        ({"base": "lab/ml"}, "did you mean 'lab/lm'"),
        ({"seed": "zero"}, "seed"),
        ({"steps": [{"train": {"source": {"data.file": {"path": "missing.jsonl"}}, "steps": 1}}]}, "missing.jsonl"),
        (
            {"steps": [{"train": {"source": {"data.file": {"path": "x"}}, "steps": 1, "trainable": ["merge.linear"]}}]},
            "merge.linear",
        ),
        ({"steps": [{"name": "../up", "measure": True}]}, "folder"),
    ],
)
def test_bad_recipes_end_with_2_and_one_sentence(tmp_path, capsys, change, wanted):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"base": "lab/lm", "steps": []} | change))
    refused = spoken(capsys, "tune", path, "--out", tmp_path / "out", "--quiet", code=2)
    assert wanted in refused["error"] and "\n" not in refused["error"]


def test_a_folder_with_other_files_is_left_alone(folder, tmp_path, capsys):
    path = recipe(folder)
    (tmp_path / "mine.txt").write_text("mine")
    refused = spoken(capsys, "tune", path, "--out", tmp_path, code=2)
    assert "other files" in refused["error"] and [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_two_processes_speak_once(folder):
    path = recipe(folder)
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29517",
        "-m",
        "temperament.cli",
        "tune",
        str(path),
        "--out",
        str(folder / "two"),
        "--json",
    ]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["status"] == "done"


def test_a_run_of_another_recipe_is_not_written_over_by_a_slip(run, capsys):
    place, _ = run
    before = (place / "run.json").read_text()
    assert cli.main(["tune", str(place / "recipe.yaml"), "--out", str(place), "--set", "seed=77"]) == 2
    said = capsys.readouterr().err
    assert "other seed" in said and "--fresh" in said and (place / "run.json").read_text() == before
