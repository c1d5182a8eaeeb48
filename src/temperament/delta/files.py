"""Folders that appear whole or not at all, names that cannot escape them, and JSON read as data only."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from temperament.errors import UserError, WorkFailed

_SAFE = re.compile(r"[A-Za-z0-9_.-]+\Z")
_LARGEST_JSON = 256 << 20  # bytes; an index of a million tensors is far below


def safe_name(name: str, field: str) -> str:
    """`name` if it can be a file or folder name and nothing else; else UserError. Stops '../../etc' in adapters and indexes."""
    if not isinstance(name, str) or not _SAFE.match(name) or set(name) == {"."}:
        raise UserError(field, name, "use letters, digits, '_', '-' and '.' only, without a path")
    return name


def read_json(path: Path, field: str) -> dict:
    """The object in a JSON file, or UserError: missing, too large, not JSON, not an object."""
    if not path.is_file():
        raise UserError(field, str(path), "there is no such file; check the folder")
    if path.stat().st_size > _LARGEST_JSON:
        raise UserError(field, str(path), f"it is larger than {_LARGEST_JSON >> 20} MiB; this is not the expected file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(field, str(path), f"it is not valid JSON ({str(error)[:80]}); copy or write it again") from None
    if not isinstance(value, dict):
        raise UserError(field, str(path), "it must hold a JSON object")
    return value


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step (Linux renameat2), so that no moment has neither; False where the system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call(here, os.fsencode(a), here, os.fsencode(b), swap) == 0


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        pass
    return True


@contextlib.contextmanager
def atomic_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder beside `path` to write in; renamed to `path` when the block ends well, removed when it does not.

    A reader, or a kill at any moment, sees the old folder or the new one, never half of either. A full disk or a folder that
    cannot be written is WorkFailed in one sentence. An existing `path` that is not empty is refused unless `overwrite`.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not path.is_dir():
        raise UserError("output folder", str(path), "it is a file; name a folder")
    if not overwrite and path.exists() and any(path.iterdir()):
        raise UserError("output folder", str(path), "it is not empty; name a new folder")
    host = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())
    new = path.parent / f".{path.name}.new-{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    for left in path.parent.glob(f".{glob.escape(path.name)}.new-{host}-*"):  # of a process that was killed
        if not _alive(left.name.split("-")[-2]):
            shutil.rmtree(left, ignore_errors=True)
    try:
        new.mkdir(parents=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise WorkFailed(f"{path} could not be written: the disk is full; nothing was changed") from error
        raise UserError("output folder", str(path), f"it cannot be made ({error.strerror}); name another") from None
    try:
        yield new
        if path.is_dir() and not _exchange(new, path):
            shutil.rmtree(path)
        if new.exists() and not path.exists():
            new.rename(path)
    except OSError as error:
        known = {errno.ENOSPC: "the disk is full", errno.EACCES: "it is not writable", errno.EROFS: "it is not writable"}
        why = known.get(error.errno, error.strerror or error)
        raise WorkFailed(f"{path} could not be written: {why}; nothing was changed") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
