"""Checkpoints on disk: equal to what the safetensors library reads, every damage refused in one sentence, memory bounded."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from temperament.delta.files import atomic_folder, safe_name
from temperament.delta.stream import Checkpoint, finite, open_source
from temperament.delta.sweep import sweep
from temperament.delta.tensorfile import DTYPES, Entry, Writer, write_tensors
from temperament.errors import UserError, WorkFailed


def tensors():
    return {
        "model.embed.weight": torch.randn(30, 8),
        "layers.0.w": torch.randn(8, 8).bfloat16(),
        "layers.0.b": torch.randn(8).half(),
        "layers.1.w": torch.randn(3, 2, 2, 2),
        "steps": torch.tensor(7),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
    }


@pytest.fixture(params=["single", "sharded"])
def folder(request, tmp_path):
    state = tensors()
    write_tensors(tmp_path, state, shard_bytes=10**9 if request.param == "single" else 300)
    return tmp_path, state


def test_reads_and_writes_what_the_library_does(folder):
    path, state = folder
    files = list(path.glob("*.safetensors"))
    read = {k: v for file in files for k, v in safetensors.torch.load_file(file).items()}
    assert read.keys() == state.keys() and all(torch.equal(read[k], state[k]) for k in state)
    with Checkpoint(path) as source:
        assert source.names == sorted(f"lm/{k}" for k in state)
        for name, tensor in state.items():
            got = source.read(f"lm/{name}")
            assert got.dtype == tensor.dtype and torch.equal(got, tensor)
            blocks = [source.block(f"lm/{name}", *at).clone() for at in source.blocks(f"lm/{name}", 5)]
            assert torch.equal(torch.cat(blocks) if blocks else tensor.view(-1), tensor.view(-1))
        buffer = torch.empty(500)
        assert torch.equal(source.read("lm/model.embed.weight", buffer), state["model.embed.weight"])
        assert buffer[0] == state["model.embed.weight"][0, 0]
    if len(files) > 1:
        index = json.loads((path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
        assert set(index["weight_map"]) == set(state) and all((path / f).is_file() for f in index["weight_map"].values())
    with safetensors.safe_open(files[0], "pt") as f:
        assert f.metadata() == {"format": "pt"}


def test_reads_the_librarys_files(tmp_path):
    state = {f"t{i}": torch.ones(3).to(d) for i, d in enumerate(DTYPES.values()) if not d.is_complex}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    source = Checkpoint(tmp_path)
    assert all(torch.equal(source.read(f"lm/{k}").float(), v.float()) for k, v in state.items())


def damage(path, how):
    file = sorted(path.glob("*.safetensors"))[-1]
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]

    def rewritten(header):
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + body

    name = next(k for k in header if k != "__metadata__" and header[k]["data_offsets"][1] > 0)
    wrong = {
        "truncated": data[:-3],
        "longer": data + b"xx",
        "empty": b"",
        "short": data[:6],
        "length": (1 << 60).to_bytes(8, "little") + data[8:],
        "json": data[:8] + b"{" * length + body,
        "pickle": b"PK\x03\x04" + data,
        "shape": rewritten(header | {name: header[name] | {"shape": [10**6]}}),
        "negative": rewritten(header | {name: header[name] | {"shape": [-1, -8]}}),
        "dtype": rewritten(header | {name: header[name] | {"dtype": "F7"}}),
        "offsets": rewritten(header | {name: header[name] | {"data_offsets": [8, 4]}}),
        "table": rewritten(header | {name: [1, 2]}),
        "missing": None,
    }[how]
    file.write_bytes(wrong) if wrong is not None else file.unlink()


@pytest.mark.parametrize(
    "how",
    [
        "truncated", "longer", "empty", "short", "length", "json", "pickle",
        "shape", "negative", "dtype", "offsets", "table", "missing",
    ],
)
def test_damage_is_refused(folder, how):
    path, _ = folder
    damage(path, how)
    with pytest.raises(UserError) as error:
        Checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_pickles_and_wrong_indexes_are_refused(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        Checkpoint(tmp_path)
    with pytest.raises(UserError, match="pickle"):
        Checkpoint(tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="pickle"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for where in ({"w": "../secret.safetensors"}, {"w": "/etc/passwd"}, {}, [], "x", {"w": 3}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        with pytest.raises(UserError):
            Checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        Checkpoint(tmp_path)
    with pytest.raises(UserError, match="no such"):
        Checkpoint(tmp_path / "nowhere")


def test_a_tensor_the_index_promises(tmp_path):
    write_tensors(tmp_path, tensors(), shard_bytes=300)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost"] = index["weight_map"]["steps"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="ghost"):
        Checkpoint(tmp_path)


def test_pipelines_have_components(tmp_path):
    index = {"_class_name": "P", "unet": [], "vae": [], "text_encoder": [], "scheduler": []}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (tmp_path / part).mkdir()
        write_tensors(tmp_path / part, {"w": torch.ones(2)}, stem)
    (tmp_path / "scheduler").mkdir()
    assert Checkpoint(tmp_path).names == ["codec/w", "denoiser/w", "text_encoder/w"]


def test_modules_name_tied_tensors_once():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.a_head = torch.nn.Embedding(5, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 5)
            self.a_head.weight = self.embed.weight

    source = open_source(Net())
    assert source.aliases == {"lm/a_head.weight": "lm/embed.weight"}
    assert source.is_buffer("lm/norm.running_mean") and not source.is_buffer("lm/norm.weight")


def test_unknown_names_get_a_near_one(folder):
    with pytest.raises(UserError, match=r"model\.embed\.weight"):
        Checkpoint(folder[0]).read("lm/model.embd.weight")


def test_finite():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        t = torch.full((100,), 3e4).to(dtype)
        assert finite(t) and finite(torch.full((100,), torch.finfo(dtype).max, dtype=dtype))  # only the sum overflows
        for bad in (float("nan"), float("inf"), -float("inf")):
            t = t.clone()
            t[50] = bad
            assert not finite(t)
    assert finite(torch.arange(3)) and finite(torch.empty(0))


def test_writer_is_all_or_nothing(tmp_path):
    with pytest.raises(AssertionError, match="not written whole"), Writer(tmp_path, {"w": Entry(torch.float32, (4,))}):
        pass
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as new:
        (new / "half").write_text("x")
        raise RuntimeError
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "out", overwrite=True) as new:
            (new / "file").write_text(text)
    assert (tmp_path / "out" / "file").read_text() == "two" and [p.name for p in (tmp_path / "out").iterdir()] == ["file"]
    with pytest.raises(UserError), atomic_folder(tmp_path / "out"):
        pass
    with pytest.raises(WorkFailed, match="no room"):
        Writer(tmp_path, {"w": Entry(torch.float32, (1 << 50,))})


@pytest.mark.skipif(sys.platform != "linux", reason="an exchange of folders is one step only on Linux")
def test_a_reader_never_sees_half(tmp_path):
    """One process overwrites a folder of two files without pause and is killed; a reader always finds a matching pair."""
    code = """
import sys
from temperament.delta.files import atomic_folder
for i in range(10**9):
    with atomic_folder(sys.argv[1], overwrite=True) as new:
        (new / "a").write_text(str(i))
        (new / "b").write_text(str(i))
"""
    path = tmp_path / "out"
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        end, seen = time.monotonic() + 30, set()
        while len(seen) < 300 and time.monotonic() < end:
            time.sleep(0.0005)  # a machine that is full lets the writer run, too
            if path.exists():
                folder = os.open(path, os.O_RDONLY)  # one version, even if it is exchanged meanwhile
                try:
                    a, b = (Path(f"/proc/self/fd/{folder}/{name}").read_text() for name in "ab")
                    assert a == b
                    seen.add(a)
                except FileNotFoundError:
                    assert seen or path.exists()  # that version was replaced and removed while we looked
                finally:
                    os.close(folder)
                assert path.is_dir()
        assert len(seen) > 20
    finally:
        writer.kill()
        writer.wait()
    assert (path / "a").read_text() == (path / "b").read_text()
    with atomic_folder(path, overwrite=True) as new:
        assert [p for p in tmp_path.iterdir() if p != path] == [new]  # what the killed one left is gone
    assert [*tmp_path.iterdir()] == [path] and not any(path.iterdir())
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError), atomic_folder(tmp_path / "file", overwrite=True):
        pass


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/x", "a\\b", "a b", "ä", "x\n", "~", None])
def test_unsafe_names(name):
    with pytest.raises(UserError):
        safe_name(name, "adapter name")


@pytest.mark.parametrize("threads", [1, 3])
def test_sweep_is_the_plain_loop(tmp_path, threads):
    states = [{"a": torch.randn(7, 11), "b": torch.randn(5), "c": torch.zeros(0)} for _ in range(3)]
    for i, state in enumerate(states):
        (tmp_path / str(i)).mkdir()
        write_tensors(tmp_path / str(i), state)
    (tmp_path / "out").mkdir()
    with Writer(tmp_path / "out", {k: Entry(t.dtype, tuple(t.shape)) for k, t in states[0].items()}) as writer:
        work = lambda name, start, blocks, out: torch.add(blocks[0], blocks[1] - blocks[2], alpha=0.5, out=out)
        sweep(work, [Checkpoint(tmp_path / str(i)) for i in range(3)], writer=writer, block=10, threads=threads)
    out = Checkpoint(tmp_path / "out")
    for k in states[0]:
        assert torch.equal(out.read(f"lm/{k}"), states[0][k] + 0.5 * (states[1][k] - states[2][k]))

    def fails(name, start, blocks, out):
        raise WorkFailed("no")

    with pytest.raises(WorkFailed):
        sweep(fails, [out], threads=threads)


SWEEP = """
import resource, sys, torch
from temperament.delta.stream import Checkpoint
from temperament.delta.sweep import sweep
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sweep(lambda name, start, blocks, out: blocks[0].sum(), [Checkpoint(sys.argv[1])] * 2, block=1 << 18)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    grown = []
    for size in (1, 16):
        (tmp_path / str(size)).mkdir()
        write_tensors(tmp_path / str(size), {"w": torch.zeros(size << 20)})  # 4 and 64 MiB
        command = [sys.executable, "-c", SWEEP, str(tmp_path / str(size))]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        grown.append(int(run.stdout) / 1024)
    assert max(grown) < 24, grown  # MiB


