"""Help is quick, complete and says what the verbs say."""

import importlib
import inspect
import json
import subprocess
import sys
import time

import pytest

from temperament import cli
from temperament.cli import app, helps
from temperament.errors import UserError

VERBS = sorted(cli.ALL)


def python(code, **env):
    import os

    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120)


def test_importing_and_helping_load_no_torch():
    code = "import sys, {}; print([m for m in ('torch', 'transformers', 'numpy', 'rich', 'yaml') if m in sys.modules])"
    assert python(code.format("temperament, temperament.cli")).stdout.strip() == "[]"
    code = (
        "import sys; from temperament.cli import main; code = main(['--help']); "
        "print(code, [m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert python(code).stdout.rstrip().endswith("0 []")


def test_help_is_quick():
    began = time.perf_counter()
    python("from temperament.cli import main; main(['--help'])")
    print(f"temper --help took {time.perf_counter() - began:.3f} s")  # printed, not asserted: machines differ
    for verb in VERBS:
        began = time.perf_counter()
        helps.of_verb(verb)
        assert "torch" not in importlib.import_module(f"temperament.cli.{verb}").__dict__


def test_text_listings_load_no_torch():
    out = python("import sys; from temperament.cli import main; main(['parts']); print('torch' in sys.modules)")
    assert out.stdout.rstrip().endswith("False"), out.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_says_its_purpose_once(verb):
    module = cli.module(verb)
    first = inspect.getdoc(module).split("\n")[0]
    assert first == cli.ALL[verb]
    assert f"    temper {verb}" in module.__doc__, "an example"
    assert callable(module.run) and callable(module.show)


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_every_option(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    for option in (*cli.module(verb).OPTIONS, *app.COMMON):
        assert option.usage in text and option.help
        assert option.help[0].islower() or option.help[0].isupper() or option.help[0].isdigit()
    assert max(map(len, text.splitlines())) <= 140


def test_every_file_of_the_cli_is_a_verb_or_known():
    from pathlib import Path

    files = {p.stem for p in Path(cli.__file__).parent.glob("*.py")} - {
        "__init__",
        "__main__",
        "app",
        "helps",
        "live",
        "say",
        "views",
    }
    assert files == set(VERBS)


def test_the_overview_lists_all_verbs(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb}" in text for verb in VERBS)


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["tun"], "did you mean 'tune'?"),
        (["new", "--learning_rate", "3"], "did you mean --lr?"),
        (["new", "--num_train_epochs=3"], "did you mean --epochs?"),
        (["new", "--per_device_train_batch_size", "2"], "did you mean --batch?"),
        (["tune", "--output_dir", "x"], "did you mean --out?"),
        (["tune", "--learning_rate", "3"], "--set KEY=VALUE"),
        (["tune"], "needs RECIPE"),
        (["tune", "a.yaml", "b.yaml"], "one word too many"),
        (["new", "sft", "--lr", "fast"], "--lr is 'fast': give a number"),
        (["export", "x", "--to", "y", "--as", "adaptor"], "did you mean 'adapter'?"),
        (["tune", "no.yaml"], "no such file"),
        (["parts", "--room", "adapter"], "did you mean 'adapters'?"),
        (["part", "lora"], "did you mean 'adapters.lora'?"),
    ],
)
def test_what_is_wrong_is_one_sentence(argv, wanted, capsys):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert wanted in err and out == "" and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1 and err.rstrip()[-1] in ".?"
    assert cli.main([*argv, "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert wanted in said["error"] and {"field", "value", "mend"} <= said.keys()


def test_options_may_stand_anywhere():
    options = (
        app.Opt("a", "x", "A"),
        app.Opt("b", "x", "B", many=True),
        app.Opt("--n", "x", "N", int, 1),
        app.Opt("--flag", "x"),
    )
    for line in (
        ["1", "2", "3", "--n", "4", "--flag"],
        ["--flag", "1", "--n=4", "2", "3"],
        ["1", "--n", "4", "2", "--flag", "3"],
    ):
        a = app.parse("tune", options, line)
        assert (a.a, a.b, a.n, a.flag) == ("1", ["2", "3"], 4, True)
    with pytest.raises(UserError):
        app.parse("tune", options, ["--fla"])  # no abbreviations: a typo must not mean something
