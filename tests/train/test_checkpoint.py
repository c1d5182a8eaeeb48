"""Checkpoints: whole or absent, the last good one used, nothing half written, no pickle, and one sentence when the disk says
no."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temperament.errors import UserError, WorkFailed
from temperament.methods.adapters.lora import LoRA
from temperament.methods.optim.adamw import AdamW
from temperament.run.artefacts import Folder
from temperament.run.recipe import Save
from temperament.run.training import run_train
from temperament.train import checkpoint
from tests.train.rows import base_of, context, spec

TENSORS = {"live": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}, "optimizer": {"0/step": torch.tensor(3.0)}}


def saved(folder: Path, *steps: int, keep: int = 9) -> Path:
    for step in steps:
        at = {name: {k: t + step for k, t in group.items()} for name, group in TENSORS.items()}
        path = checkpoint.save(folder, step, at, {"key": "k", "rate": 0.1 + step}, keep)
    return path


def test_what_was_saved_is_read(tmp_path):
    saved(tmp_path, 3)
    state, tensors = checkpoint.load_newest(tmp_path)
    assert state["step"] == 3 and state["rate"] == 3.1 and state["damaged"] == []
    assert torch.equal(tensors["live"]["a"], TENSORS["live"]["a"] + 3) and tensors.keys() == TENSORS.keys()
    names = sorted(p.name for p in (tmp_path / "step-000003").iterdir())
    assert names == ["live.safetensors", "optimizer.safetensors", "state.json"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(tmp_path, keep):
    saved(tmp_path, 1, 2, 5, 9, 12, keep=keep)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000005", "step-000009", "step-000012"][-keep:]


def test_what_another_recipe_left_behind_hides_nothing(tmp_path):
    saved(tmp_path, 50, 100)
    checkpoint.save(tmp_path, 10, TENSORS, {"key": "edited"}, keep=2)
    assert checkpoint.load_newest(tmp_path)[0]["key"] == "edited"
    checkpoint.save(tmp_path, 60, TENSORS, {"key": "edited"}, keep=2)
    assert [p.name for p in checkpoint.newest_last(tmp_path)] == ["step-000010", "step-000060"]


def test_the_newest_is_by_number(tmp_path):
    saved(tmp_path, 999_998, 999_999, 1_000_000, keep=2)
    assert [p.name for p in checkpoint.newest_last(tmp_path)] == ["step-999999", "step-1000000"]
    assert checkpoint.load_newest(tmp_path)[0]["step"] == 1_000_000


def test_the_log_forgets_steps_that_are_gone(tmp_path):
    folder = Folder(tmp_path / "run")
    folder.open(resume=False, fresh=False)
    for name in ("old", "sft", "r/1/x"):
        with folder.logging(name) as (append, _):
            append({"step": 1})
    stages = lambda: [json.loads(line)["stage"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    folder.log_only({"sft", "r/1/x"})
    assert stages() == ["sft", "r/1/x"]
    folder.save_run({"status": "done"})
    folder.open(resume=False, fresh=True)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_none_and_none_whole(tmp_path):
    assert checkpoint.load_newest(tmp_path / "nothing") is None
    saved(tmp_path, 1)
    (tmp_path / "step-000001" / "live.safetensors").unlink()
    state, tensors = checkpoint.load_newest(tmp_path)
    assert tensors == {} and len(state["damaged"]) == 1


def damage_truncate(folder):
    path = folder / "live.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def damage_bit(folder):
    path = folder / "live.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def damage_missing(folder):
    (folder / "optimizer.safetensors").unlink()


def damage_json(folder):
    (folder / "state.json").write_text('{"step": ')


def damage_type(folder):
    (folder / "state.json").write_text('["no", "mapping"]')


def tamper_state(folder):
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "rate": 99.0}))


def tamper_path(folder):
    """A file outside the folder, with the right sums."""
    state = json.loads((folder / "state.json").read_text())
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes((folder / "live.safetensors").read_bytes())
    state["files"]["../outside.safetensors"] = state["files"]["live.safetensors"]
    state.pop("sha256")
    (folder / "state.json").write_text(json.dumps({**state, "sha256": checkpoint._sum(state)}))


def tamper_pickle(folder):
    """A pickle where safetensors belong, with the right sums."""
    torch.save({"a": torch.ones(1)}, folder / "live.safetensors")
    state = json.loads((folder / "state.json").read_text())
    state["files"]["live.safetensors"] = checkpoint._sha(folder / "live.safetensors")
    state.pop("sha256")
    (folder / "state.json").write_text(json.dumps({**state, "sha256": checkpoint._sum(state)}))


DAMAGES = [damage_truncate, damage_bit, damage_missing, damage_json, damage_type, tamper_state, tamper_path, tamper_pickle]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_the_one_before_is_used(tmp_path, damage):
    saved(tmp_path, 1, 2)
    damage(tmp_path / "step-000002")
    state, tensors = checkpoint.load_newest(tmp_path)
    assert state["step"] == 1 and state["damaged"][0].startswith("step-000002: ")
    assert torch.equal(tensors["live"]["b"], TENSORS["live"]["b"] + 1)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_changed_byte_is_noticed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("c")
    saved(folder, 1)
    name = data.draw(st.sampled_from(["live.safetensors", "optimizer.safetensors", "state.json"]))
    path = folder / "step-000001" / name
    raw = bytearray(path.read_bytes())
    at, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 7))
    raw[at] ^= 1 << bit
    before = json.loads(path.read_text()) if name == "state.json" else None
    path.write_bytes(bytes(raw))
    state, tensors = checkpoint.load_newest(folder)
    if before is not None and tensors:  # a byte of white space, or of the way a number is written
        assert json.loads(bytes(raw).decode()) == before
    else:
        assert tensors == {} and state["damaged"]


# ---- a disk that says no -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, word", [(errno.ENOSPC, "No space left"), (errno.EACCES, "Permission denied"), (errno.EROFS, "Read-only")]
)
@pytest.mark.parametrize("call", ["save_file", "fsync", "replace"])
def test_disk_says_no(tmp_path, monkeypatch, call, code, word):
    saved(tmp_path, 1)
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(*((checkpoint, "save_file") if call == "save_file" else (os, call)), refuse)
    with pytest.raises(WorkFailed, match=word) as problem:
        saved(tmp_path, 2)
    monkeypatch.undo()
    assert problem.value.exit_code == 1 and "\n" not in str(problem.value)
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before, "something half written was left"
    assert checkpoint.load_newest(tmp_path)[0]["step"] == 1


def test_small_files_are_replaced_or_left(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    checkpoint.write_atomic(path, "one")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkFailed, match=r"run\.json could not be written \(No space left on device\)"):
        checkpoint.write_atomic(path, "two")
    monkeypatch.undo()
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


def go(folder: Path, **options) -> str:
    base = base_of("llama_tied")
    run = spec(trainable=[LoRA(rank=2)], optimizer=AdamW(1e-3), steps=8, save=Save(seconds=1e9, steps=2), **options)
    folder.mkdir(exist_ok=True)
    return run_train(run, context(base), Folder(folder), "s", "k", lambda live, items: {}, lambda *a, **k: None).delta.digest


def test_a_full_disk_in_the_middle_is_resumed_to_the_same_bits(tmp_path, monkeypatch):
    whole = go(tmp_path / "whole")
    calls, real = [], checkpoint.save_file

    def full(tensors, path):
        calls.append(path)
        if len(calls) > 5:
            real({k: t.flatten()[:1].clone() for k, t in tensors.items()}, path)  # half of it reaches the disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(WorkFailed, match=r"No space left on device.*resume"):
        go(tmp_path / "run")
    monkeypatch.undo()
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints" / "s").iterdir())
    assert kept and all(k.startswith("step-") for k in kept)
    assert go(tmp_path / "run") == whole


def test_a_damaged_newest_checkpoint_costs_steps_and_no_bits(tmp_path):
    whole = go(tmp_path / "run")
    place = tmp_path / "run" / "checkpoints" / "s"
    newest = sorted(place.iterdir())[-1]
    damage_bit_in = next(newest.glob("*live.safetensors"))
    damage_bit_in.write_bytes(damage_bit_in.read_bytes()[:-1] + b"\0\1")
    notes = []
    base = base_of("llama_tied")
    run = spec(trainable=[LoRA(rank=2)], optimizer=AdamW(1e-3), steps=8, save=Save(seconds=1e9, steps=2))
    tell = lambda event, **data: notes.append(data.get("text", ""))
    assert run_train(run, context(base), Folder(tmp_path / "run"), "s", "k", lambda live, items: {}, tell).delta.digest == whole
    assert any("passed over" in n for n in notes) and any("resumed at step 4" in n for n in notes)


def test_a_checkpoint_of_another_step_is_not_taken(tmp_path):
    go(tmp_path / "run")
    base, notes = base_of("llama_tied"), []
    run = spec(trainable=[LoRA(rank=2)], optimizer=AdamW(2e-3), steps=8, save=Save(seconds=1e9))
    tell = lambda event, **data: notes.append(data.get("text", ""))
    run_train(run, context(base), Folder(tmp_path / "run"), "s", "other key", lambda live, items: {}, tell)
    assert not any("resumed" in n for n in notes)


@pytest.mark.parametrize("what", ["a file", "under a file"])
def test_folders_that_cannot_be_written(tmp_path, what):
    """(Root writes into read-only folders, so a path through a file stands for all of them.)"""
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" if what == "a file" else tmp_path / "file" / "run"
    with pytest.raises(UserError, match="name a") as problem:
        Folder(target).open(resume=False, fresh=False)
    assert problem.value.exit_code == 2 and "\n" not in str(problem.value)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights(tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"):
        Folder(tmp_path / "shut" / "run").open(resume=False, fresh=False)
