"""data.file, data.mix, data.folder_images: from a file to the batches of a step, on an embedded base."""

import json
from types import SimpleNamespace

import pytest
import torch

from temperament import parts
from temperament.bases.load import load
from temperament.engine.rows import held_out, read_rows
from temperament.errors import UserError
from temperament.protocols import Source
from temperament.train.context import Context


@pytest.fixture(scope="module")
def base():
    return load("lab/lm")


def context(base, **more):
    told = []
    tell = lambda event, **data: told.append((event, data))
    ctx = Context(base, SimpleNamespace(rank=0, size=1), seed=3, batch=4, tell=tell, **more)
    ctx.told = told
    return ctx


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def sums(n, start=0):
    return [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(start, start + n)]


def chats(n):
    talk = lambda i: [("user", f"{i}?"), ("assistant", f"yes {i}"), ("user", "why"), ("assistant", "so")]
    return [{"messages": [{"role": r, "content": c} for r, c in talk(i)]} for i in range(n)]


def test_a_file(base, tmp_path):
    path, ctx = write(tmp_path / "new.jsonl", sums(20)), None
    ctx = context(base)
    stream = parts.build({"data.file": {"path": path}}, Source).open(ctx)
    assert stream.yields == ("Tokens",) and stream.steps_per_epoch == 5  # eighteen of twenty rows, four a step
    batch = stream.batch(0, None)
    assert len(batch) == 4 and batch.extra[0]["source"] == "new" and batch.extra[0]["origin"].startswith(path)
    kept = {e.prompt for e in held_out(list(read_rows(path)), 0.1)[1]}
    assert kept == {e.prompt for e in parts.build({"data.file": {"path": path}}).held()}
    seen = [base.tokenizer.decode(ids[mask]) for k in range(5) for ids, mask in zip(stream[k].ids, stream[k].mask, strict=True)]
    assert len(seen) == 18 and len(kept) == 2 and not any(s.startswith("<s>" + k) for k in kept for s in seen)
    ((event, data),) = ctx.told
    assert event == "data" and data["held_out"] == 2 and data["examples"] == 18 and 0 < data["share"] < 1
    json.dumps(data)


def test_conversations_with_the_template_of_the_base(base, tmp_path):
    path, tok = write(tmp_path / "chat.jsonl", chats(12)), base.tokenizer
    whole = parts.build({"data.file": {"path": path, "holdout": 0.0}}, Source).open(context(base))
    apart = parts.build({"data.file": {"path": path, "holdout": 0.0, "turns": "apart"}}, Source).open(context(base))
    trained = lambda batch: [tok.decode(i[w > 0]) for i, w in zip(batch.ids, batch.weights, strict=True)]
    text = lambda s: sorted(t for k in range(len(s)) for t in trained(s[k]))
    assert text(whole)[0] == "yes 0<|end|>so<|end|>"
    assert text(apart) == sorted([f"yes {i}<|end|>" for i in range(12)] + ["so<|end|>"] * 12)
    packed = parts.build({"data.file": {"path": path, "holdout": 0.0, "pack": 100}}, Source).open(context(base))
    assert packed.fill().rate > 0.3 and all(packed[k].trained == whole[k].trained for k in range(3))


def test_other_kinds_and_refusals(base, tmp_path):
    pairs = write(tmp_path / "p.jsonl", [{"prompt": f"{i}?", "chosen": " yes", "rejected": " no"} for i in range(9)])
    stream = parts.build({"data.file": {"path": pairs}}, Source).open(context(base))
    assert stream.yields == ("Pairs",) and stream[0].chosen.ids.shape[0] == 4
    prompts = write(tmp_path / "q.jsonl", [{"prompt": "a", "answer": "b"}])
    long = write(tmp_path / "l.jsonl", [*sums(3), {"prompt": "x" * 5000, "completion": "y"}])
    for path, options, why in [
        (prompts, {}, "nothing to train on"),
        (long, {"holdout": 0.0}, "line 4.*max_length"),
        (pairs, {"pack": 64}, "not packed"),
        (pairs, {"mask": "all"}, "auto, completion"),
        (pairs, {"columns": {"prompt": "x"}}, "no such column"),
    ]:
        with pytest.raises(UserError, match=why):
            parts.build({"data.file": {"path": path, **options}}, Source).open(context(base))
    ctx = context(base)
    parts.build({"data.file": {"path": long, "holdout": 0.0, "on_bad": "skip"}}, Source).open(ctx)
    assert ctx.told[0][1]["left_out"] == 1 and "line 4" in ctx.told[0][1]["bad"][0]
    for options, why in [({"holdout": -1.0}, "negative"), ({"split_long": True}, "pack"), ({"on_bad": "ignore"}, "on_bad")]:
        with pytest.raises(UserError, match=why):
            parts.build({"data.file": {"path": long, **options}}, Source)


def test_the_artefact_of_a_build_step(base, tmp_path):
    write(tmp_path / "rows.jsonl", sums(8))
    ctx = context(base, artefacts={"made": tmp_path})
    assert len(parts.build({"data.file": {"path": "made", "holdout": 0.0}}, Source).open(ctx).examples) == 8


def test_fingerprints_follow_the_content(tmp_path):
    path = write(tmp_path / "a.jsonl", sums(3))
    source = parts.build({"data.file": {"path": path}}, Source)
    before = source.fingerprint()
    write(tmp_path / "a.jsonl", sums(4))
    assert source.fingerprint() != before
    write(tmp_path / "a.jsonl", sums(3))
    assert parts.build({"data.file": {"path": path}}).fingerprint() == before


def test_a_mixture(base, tmp_path):
    a, b = write(tmp_path / "new.jsonl", sums(20)), write(tmp_path / "old.jsonl", sums(40, 100))
    spec = {"data.mix": {"sources": [{"data.file": {"path": a}}, {"data.file": {"path": b}}], "weights": [3.0, 1.0]}}
    mixed = parts.build(spec, Source)
    assert [next(iter(s.values()))["data"].called for s in mixed.suites()] == ["new", "old"]
    stream = mixed.open(context(base))
    for k in range(6):
        assert sorted(e["source"] for e in stream.batch(k, None).extra) == ["new", "new", "new", "old"]
    again = mixed.open(context(base))
    assert torch.equal(again.batch(5).ids, stream.batch(5).ids)
    with pytest.raises(UserError, match="one for each"):
        parts.build({"data.mix": {"sources": [{"data.file": {"path": a}}], "weights": [1.0, 2.0]}}, Source)


@pytest.mark.parametrize("other", [{}, {"pack": 96}, {"pack": 128, "count": "rows"}, {"pack": 128, "split_long": True}])
def test_sources_laid_out_otherwise_do_not_mix(base, tmp_path, other):
    a, b = write(tmp_path / "new.jsonl", sums(9)), write(tmp_path / "old.jsonl", sums(9, 100))
    mixed = lambda one, two: parts.build(
        {"data.mix": {"sources": [{"data.file": {"path": a, **one}}, {"data.file": {"path": b, **two}}]}}, Source
    ).open(context(base))
    for pair in (({"pack": 128}, other), (other, {"pack": 128})):
        with pytest.raises(UserError, match=r"data.mix.sources is .*new: .* and old: .*differ in (pack|split_long)"):
            mixed(*pair)
    assert mixed(other, other).batch(0) is not None


def test_images_of_a_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name in ("a", "b", "c"):
        image.new("RGB", (16, 16), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "tiny.png").write_bytes((tmp_path / "a.png").read_bytes()[:50])
    image.new("RGB", (2, 16)).save(tmp_path / "thin.png")
    good = [{"file_name": "a.png", "text": "a red square"}, {"file_name": "b.png", "text": "again"}]
    write(tmp_path / "metadata.jsonl", good)
    source = parts.build({"data.folder_images": {"path": str(tmp_path)}})
    rows = source.read()
    assert [e.text for e in rows] == ["a red square", "again"] and rows[0].image == str(tmp_path / "a.png")
    assert "3 images have no caption" in rows.notes[0]
    for bad, why in [
        ("../secret.png", "outside of the folder"),
        ("/etc/hostname", "outside of the folder"),
        ("none.png", "no such file"),
        ("tiny.png", "cannot be opened"),
        ("thin.png", "2 x 16 pixels"),
    ]:
        write(tmp_path / "metadata.jsonl", [*good, {"file_name": bad, "text": "x"}])
        with pytest.raises(UserError, match=why) as e:
            source.read()
        assert "metadata.jsonl, line 3" in str(e.value)
        skipping = parts.build({"data.folder_images": {"path": str(tmp_path), "on_bad": "skip"}}).read()
        assert len(skipping) == 2 and why in skipping.bad[0].reason
    (tmp_path / "metadata.jsonl").unlink()
    for name in ("tiny", "thin"):
        (tmp_path / f"{name}.png").unlink()
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("a square\n")
    with pytest.raises(UserError, match=r"caption c\.txt"):
        source.read()
    assert len(parts.build({"data.folder_images": {"path": str(tmp_path), "on_bad": "skip"}}).read()) == 2


def test_a_folder_of_images_is_shown_with_its_captions(tmp_path):
    from PIL import Image

    from temperament import api

    for n, words in enumerate(("a red disc", "a blue cross on grey")):
        Image.new("RGB", (16, 9 + n)).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text(words)
    seen = api.look(str(tmp_path), "lab/lm")
    assert seen["shape"] == "captioned" and seen["totals"]["examples"] == 2 and seen["totals"]["trained"] == 0
    assert "0.png (16 x 9)" in seen["shown"][0]["origin"] and any("images carry the loss" in note for note in seen["notes"])
    assert "red disc" in "".join(t for t, *_ in seen["shown"][0]["sides"][0]["tokens"])
