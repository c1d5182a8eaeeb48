"""The safetensors format, read and written by offset: headers checked whole, bytes moved by `pread` and `pwrite`.

Our own reader rather than the library's, for what streaming needs: blocks into reused buffers, blocks written in any order from
any thread, and an error that names the file and the mend.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from temperament.delta.files import write_json
from temperament.errors import UserError, WorkFailed

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LARGEST_HEADER = 100 << 20  # bytes, the limit of the format


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies. `file` is None in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path | None = None
    start: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable, any dtype."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(bytearray())


def read_header(path: Path, component: str) -> dict[str, Entry]:
    """Entries of one safetensors file, every offset checked against the size on disk. UserError in one sentence otherwise."""

    def refuse(why: str) -> UserError:
        return UserError("checkpoint file", str(path), why)

    if not path.is_file():
        raise refuse("it is missing; copy the whole checkpoint again")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if head[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
            raise refuse("it is a pickle, not safetensors, and is never loaded; convert it with its own program")
        if size < 8 or length > min(_LARGEST_HEADER, size - 8):
            raise refuse("it is truncated or not safetensors; copy it again")
        try:
            table = json.loads(file.read(length))
            table.pop("__metadata__", None)
            entries = {
                f"{component}/{name}": (DTYPES[at["dtype"]], tuple(map(int, at["shape"])), *map(int, at["data_offsets"]))
                for name, at in table.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise refuse("its header is damaged or of a dtype that is not supported; copy it again") from None
    base, end, found = 8 + length, 0, {}
    for name, (dtype, shape, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        found[name] = Entry(dtype, shape, path, base + start)
        if start != end or min(shape, default=0) < 0 or stop - start != found[name].nbytes:
            raise refuse(f"the offsets of {name.split('/', 1)[1]!r} do not fit its shape; copy it again")
        end = stop
    if base + end != size:
        raise refuse(f"it is truncated or damaged ({size} bytes where {base + end} are announced); copy it again")
    return found


class Writer:
    """Safetensors written in any order, from any thread, by name or by block: the table of entries fixes every offset first.

    One file `stem.safetensors`, or shards of at most `shard_bytes` with `stem.safetensors.index.json`. Use inside
    `files.atomic_folder`; `close` refuses a tensor that was not written whole. Names are written as given.
    """

    def __init__(
        self, folder: str | Path, table: Mapping[str, Entry], stem: str = "model", shard_bytes: int = 5_000_000_000,
        metadata: Mapping[str, str] | None = None,
    ):  # fmt: skip
        shards: list[dict[str, Entry]] = [{}]
        room = shard_bytes
        for name, entry in sorted(table.items()):
            if entry.nbytes > room and shards[-1]:
                shards.append({})
                room = shard_bytes
            shards[-1][name] = entry
            room -= entry.nbytes
        self.folder, self.total = Path(folder), sum(entry.nbytes for entry in table.values())
        free = os.statvfs(self.folder)
        if self.total > free.f_bavail * free.f_frsize:
            raise WorkFailed(f"{self.folder} has no room for {self.total} bytes; nothing was written")
        digits = "" if len(shards) == 1 else "-{:05d}-of-{:05d}"
        self.files = [f"{stem}{digits.format(i + 1, len(shards))}.safetensors" for i in range(len(shards))]
        self._lock = threading.Lock()
        self._at: dict[str, tuple[int, int, Entry]] = {}
        self._left = {name: entry.nbytes for name, entry in table.items()}
        self._open = [self._lay_out(*pair, dict(metadata or {"format": "pt"})) for pair in zip(self.files, shards, strict=True)]
        if len(shards) > 1:
            where = {name: file for file, shard in zip(self.files, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": self.total}, "weight_map": where}
            write_json(self.folder / f"{stem}.safetensors.index.json", index)

    def _lay_out(self, file: str, shard: dict[str, Entry], metadata: dict[str, str]) -> int:
        header, at = {"__metadata__": metadata}, 0
        order = sorted(shard, key=lambda name: (-shard[name].dtype.itemsize, name))  # wide dtypes first: all are aligned
        for name in order:
            entry = shard[name]
            header[name] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [at, at + entry.nbytes]}
            at += entry.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(self.folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.ftruncate(descriptor, 8 + len(text) + at)
        os.pwrite(descriptor, len(text).to_bytes(8, "little") + text, 0)
        for name in order:
            self._at[name] = (descriptor, 8 + len(text) + header[name]["data_offsets"][0], shard[name])
        return descriptor

    def entry(self, name: str) -> Entry:
        return self._at[name][2]

    def write(self, name: str, tensor: Tensor) -> None:
        assert tuple(tensor.shape) == self._at[name][2].shape, name
        self.block(name, 0, tensor)

    def block(self, name: str, start: int, tensor: Tensor) -> None:
        """Flat elements from `start` on. Blocks of one tensor may come from several threads but not overlap."""
        descriptor, at, entry = self._at[name]
        tensor = tensor.detach().cpu().contiguous()
        assert tensor.dtype == entry.dtype and start + tensor.numel() <= entry.numel, name
        view, at = raw(tensor), at + start * entry.dtype.itemsize
        while len(view):
            put = os.pwrite(descriptor, view, at)
            view, at = view[put:], at + put
        with self._lock:
            self._left[name] -= tensor.numel() * tensor.element_size()

    def close(self, finished: bool = True) -> None:
        while self._open:
            os.close(self._open.pop())
        missing = [name for name, left in self._left.items() if left]
        assert not (finished and missing), f"not written whole: {missing[:3]}"

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.close(finished=kind is None)


def write_tensors(folder: str | Path, tensors: Mapping[str, Tensor], stem: str = "model", **options) -> None:
    """A mapping of tensors (may be lazy: each is read when its turn comes) as one file or shards."""
    table = {name: Entry(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with Writer(folder, table, stem, **options) as writer:
        for name in table:
            writer.write(name, tensors[name])
