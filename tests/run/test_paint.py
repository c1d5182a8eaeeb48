"""Pictures from the command line and from Python: the same ones, whatever the batch; files, a sheet, sentences."""

import json

import pytest
import torch
from PIL import Image

import temperament as tp
from temperament import cli
from temperament.bases import train_diffusion as lab
from temperament.bases.load import load
from temperament.delta import Delta, Dense
from temperament.engine.denoise import Sampler, denoise
from temperament.engine.measure import Pure
from temperament.engine.pictures import sheet, shown
from temperament.errors import UserError

CAPTIONS = ["a red cross at the top left on navy", "a blue disc on black"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("painter") / "base"
    lab.save(lab.fresh("flow", 1), "flow", place, {}, lab.Plan())
    return place


def test_rows_are_those_of_the_loop_whatever_the_batch(folder):
    base = load(folder)
    got = tp.sample(base, CAPTIONS, n=2, steps=3, guidance=2.0, eta=1.0, seed=7, batch=3)
    want = denoise(base, [c for c in CAPTIONS for _ in range(2)], Sampler(3, 1.0, 2.0), seed=7).pixels
    made = torch.stack([p["pixels"] for p in got["pictures"]])
    torch.testing.assert_close(made, want, rtol=1e-3, atol=1e-3)
    assert [(p["caption"], p["number"]) for p in got["pictures"]] == [(c, i) for c in CAPTIONS for i in (0, 1)]
    assert got["inference"] == [{"sample.sampler": {"steps": 3, "eta": 1.0, "guidance": 2.0}}]


def test_what_stands_beside_is_the_base_from_the_same_noise(folder):
    base = load(folder)
    name, p = next((n, p) for n, p in base.parameters() if n.endswith("proj_out.weight"))
    base.apply(Delta({name: Dense(0.05 * torch.randn_like(p))}))
    got = tp.sample(base, CAPTIONS, steps=2, beside=True)["pictures"]
    assert [p["of"] for p in got] == ["base", "base", "model", "model"]
    for view, rows in ((Pure(base), got[:2]), (base, got[2:])):
        want = denoise(view, CAPTIONS, Sampler(2, 0.0, 3.0), seed=0).pixels
        torch.testing.assert_close(torch.stack([p["pixels"] for p in rows]), want, rtol=1e-4, atol=1e-4)
    with_part = tp.sample(base, CAPTIONS, steps=2, overrides=["inference=[{sample.rl_guidance: {weight: 0.0}}]"])["pictures"]
    assert torch.equal(torch.stack([p["pixels"] for p in with_part]), torch.stack([p["pixels"] for p in got[:2]]))


def test_files_and_their_sheet(folder, tmp_path, capsys):
    argv = ["sample", str(folder), *CAPTIONS, "--n", "3", "--steps", "2", "--out", str(tmp_path / "out"), "--json"]
    assert cli.main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["pictures"]) == 6 and all(Image.open(p["file"]).size == (16, 16) for p in told["pictures"])
    assert Image.open(told["sheet"]).size == (3 * 70 + 6, 2 * 70 + 6)
    assert cli.main(argv) == 2 and "not empty" in capsys.readouterr().out


def test_scenes_are_judged_by_the_worlds_eye(folder):
    got = tp.sample(load(folder), scenes=2, steps=1)["pictures"]
    assert all(set(p) == {"caption", "number", "of", "pixels", "shows"} and p["shows"].startswith("a ") for p in got)


def test_pictures_to_look_at():
    x = torch.rand(3, 16, 24)
    assert shown(x).shape == (3, 48, 72) and torch.equal(shown(x)[:, ::3, ::3], x)
    assert shown(torch.rand(3, 512, 1024)).shape == (3, 128, 256)
    made = sheet(torch.zeros(2, 3, 3, 64, 64), gap=4)
    assert made.shape == (3, 2 * 68 + 4, 3 * 68 + 4) and made[:, :4].min() > 0.9 and made[:, 4:68, 4:68].max() == 0


@pytest.mark.parametrize(
    "how, said",
    [
        ({"n": 0}, "--n is 0"),
        ({"steps": 0}, "--steps is 0"),
        ({"eta": -1.0}, "--eta is -1.0"),
        ({"captions": []}, "say what is to be seen"),
        ({"overrides": ["inference=[sample.sampel]"]}, "sample.sampl"),
        ({"scenes": -1}, "--scenes is -1"),
        ({"beside": True}, "nothing on it"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(folder, how, said):
    with pytest.raises(UserError) as problem:
        tp.sample(load(folder), **{"captions": CAPTIONS, **how})
    assert said in str(problem.value)


def test_a_model_that_writes_does_not_paint(capsys):
    assert cli.main(["sample", "lab/lm-small", "a red cross", "--out", "nowhere"]) == 2
    assert "it makes no pictures" in capsys.readouterr().err
