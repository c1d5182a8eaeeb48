"""What a verb returns or raises becomes stdout, stderr and an exit code."""

import json
import os
import subprocess
import sys
import types

import pytest

from temperament import cli
from temperament.cli import app
from temperament.errors import Interrupted, UserError, WorkFailed


@pytest.fixture
def verb(monkeypatch):
    """A verb `doctor` that does what the test says."""

    def make(do, options=()):
        fake = types.SimpleNamespace(OPTIONS=options, run=do, show=lambda data, say, a: say.print(f"shown {data}"))
        monkeypatch.setattr(cli, "module", lambda name: fake)

    return make


def raising(problem):
    def run(a, say):
        raise problem

    return run


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (UserError("recipe.base", "x", "name one"), 2),
        (WorkFailed("The disk is full."), 1),
        (Interrupted("Stopped."), 130),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("by 0"), 1),
    ],
)
def test_exit_codes(verb, capsys, problem, code):
    verb(raising(problem))
    assert cli.main(["doctor"]) == code
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert cli.main(["doctor", "--json"]) == code
    said = json.loads(capsys.readouterr().out)
    assert said["error"] == err.strip()


def test_the_unforeseen_says_how_to_report_it(verb, capsys, monkeypatch):
    verb(raising(ZeroDivisionError("by 0\nand more")))
    cli.main(["doctor"])
    err = capsys.readouterr().err
    assert (
        err.startswith("internal error: ZeroDivisionError: by 0 and more") and "--traceback" in err and "Traceback" not in err
    )
    cli.main(["doctor", "--traceback"])
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("TEMPERAMENT_TRACEBACK", "1")
    cli.main(["doctor"])
    assert "Traceback" in capsys.readouterr().err


def test_json_is_alone_on_stdout(verb, capsys):
    def run(a, say):
        print("a library talks")
        return {"ok": True, "path": os}

    verb(run)
    assert cli.main(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["ok"] is True and "a library talks" in err


def test_not_ok_is_exit_code_1(verb, capsys):
    verb(lambda a, say: {"ok": False})
    assert cli.main(["doctor"]) == 1
    assert "shown" in capsys.readouterr().out


def test_only_the_main_process_speaks(verb, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    verb(lambda a, say: {"ok": True})
    assert cli.main(["doctor", "--json"]) == 0
    assert capsys.readouterr().out == ""
    verb(raising(UserError("a", 1, "b")))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err.startswith("process 1: a is 1")


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m temperament.cli parts | head -n 1", shell=True, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stderr == ""


def test_user_error_json_holds_any_value(verb, capsys):
    verb(raising(UserError("x", {"a": object()}, "mend it")))
    assert cli.main(["doctor", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["mend"] == "mend it"


def test_python_api_is_lazy_and_whole():
    import temperament as tp

    for name in tp.__all__:
        assert getattr(tp, name) is not None and name in dir(tp)
    assert set(cli.ALL) <= set(tp.__all__), "every verb has a name in Python"
    with pytest.raises(AttributeError):
        _ = tp.no_such_name
    assert app.MEMORY["learning-rate"] == "lr"
