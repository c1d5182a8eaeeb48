"""Identity of tensors: sha256, independent of sharding, of key order and of how tied names are stored.

    identity = sha256( for each tensor in name order: name, dtype, shape, sha256(bytes) )

Hashing each tensor by itself lets threads share the work and a lazily read delta check one tensor at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from temperament.delta.stream import BLOCK, Checkpoint, Source, open_source
from temperament.delta.tensorfile import raw

_known: dict[tuple, dict[str, str]] = {}  # (path, size, mtime of every file) -> identities; in this process only


def line(name: str, dtype: torch.dtype, shape: Iterable[int], sha: str) -> str:
    """The record of one tensor in an identity or digest."""
    return f"{name} {str(dtype).removeprefix('torch.')} {list(shape)} {sha}\n"


def tensor_sha(tensor: Tensor) -> str:
    """sha256 of the bytes of one tensor, in row order."""
    return hashlib.sha256(raw(tensor.detach().cpu().contiguous())).hexdigest()


def source_sha(source: Source, name: str) -> str:
    """The same, streamed through one buffer."""
    sha, entry = hashlib.sha256(), source.entry(name)
    buffer = torch.empty(min(BLOCK, entry.numel), dtype=entry.dtype)
    for start, stop in source.blocks(name):
        sha.update(raw(source.block(name, start, stop, buffer)))
    return sha.hexdigest()


def identity(what, component: str = "lm", threads: int = 2) -> dict[str, str]:
    """{component: sha256} of a path, module, mapping or Source. Tied tensors count once, under the name they are stored by."""
    source = open_source(what, component)
    files = {entry.file for entry in source.entries.values()} if isinstance(source, Checkpoint) else set()
    key = (component, *((str(f), (s := Path(f).stat()).st_size, s.st_mtime_ns) for f in sorted(files)))
    if files and key in _known:
        return dict(_known[key])
    names = source.names
    with ThreadPoolExecutor(threads) as pool:
        shas = dict(zip(names, pool.map(lambda name: source_sha(source, name), names), strict=True))
    found = {}
    for part in source.components:
        own = [name for name in names if name.startswith(part + "/")]
        lines = (line(n.split("/", 1)[1], source.entry(n).dtype, source.entry(n).shape, shas[n]) for n in own)
        found[part] = hashlib.sha256("".join(lines).encode()).hexdigest()
    if files:
        _known[key] = dict(found)
    return found
