"""What a run keeps, addressed by what made it.

    OUT/recipe.yaml  run.json  report.html  log.jsonl  delta/
        checkpoints/STEP/  steps/STEP/{artefact.json, delta/, outcomes.json}

A step's *key* is the sha256 of its resolved options, the key it started from, the base's identity, the seed and the content of
the files it reads: an unchanged step is not run again, a changed one is, and nothing can be stale. Scores of a base are
constants and live in the user's cache, shared by all runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from temperament.errors import UserError, WorkFailed
from temperament.parts import plain, walk
from temperament.protocols import Outcome
from temperament.train.checkpoint import write_atomic

FORMAT = 1  # raised when an old artefact must not be taken for a new one


def address(*content: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps([FORMAT, *content], sort_keys=True, default=str).encode()).hexdigest()


def made_of(spec: Any) -> list[Any]:
    """What a step is made of: its resolved options, and a fingerprint of every file its parts read. How often it is saved, and
    how its rows are split over forwards, change no result and are left out."""
    options = (
        {k: v for k, v in plain(spec).items() if k not in ("save", "micro", "checkpointing")}
        if hasattr(spec, "save")
        else plain(spec)
    )
    return [options, prints(spec)]


def prints(spec: Any) -> list[str]:
    """A fingerprint of every file that the parts in it read."""
    return [p.fingerprint() for p in walk_all(spec) if hasattr(p, "fingerprint")]


def walk_all(spec: Any) -> Iterator[Any]:
    """Every part in a recipe dataclass."""
    from dataclasses import fields, is_dataclass

    if hasattr(type(spec), "part_name"):
        yield from walk(spec)
    elif is_dataclass(spec):
        for f in fields(spec):
            yield from walk_all(getattr(spec, f.name))
    elif isinstance(spec, dict):
        for v in spec.values():
            yield from walk_all(v)
    elif isinstance(spec, (list, tuple)):
        for v in spec:
            yield from walk_all(v)


def file_sha(path: str | Path) -> str:
    """sha256 of a file, or of every file in a folder by name."""
    path, sha = Path(path), hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        sha.update(f"{file.relative_to(path.parent)}\n".encode())
        with open(file, "rb") as f:
            sha.update(hashlib.file_digest(f, "sha256").digest())
    return sha.hexdigest()


def cache_dir() -> Path:
    return Path(
        os.environ.get("TEMPERAMENT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "temperament"
    )


class Folder:
    """A run folder. Only the main process writes."""

    def __init__(self, path: str | Path, write: bool = True):
        self.path, self.write = Path(path), write

    def open(self, resume: bool, fresh: bool) -> dict[str, Any]:
        """Make or take up the folder; returns its run.json (or {}). Refuses one that holds something else, or unfinished work
        that was not asked for."""
        if self.path.is_file():
            raise UserError("--out", str(self.path), "this is a file; name a folder")
        run = self.run()
        holds = list(self.path.iterdir()) if self.path.is_dir() else []
        if holds and not run and not (self.path / ".temperament").exists():
            raise UserError("--out", str(self.path), "the folder holds other files; name a new one")
        begun = any((self.path / d).exists() for d in ("steps", "checkpoints", "log.jsonl"))
        if begun and run.get("status") in ("running", "interrupted", "failed") and not (resume or fresh):
            raise UserError(
                "--out",
                str(self.path),
                "it holds an unfinished run; add --resume to go on, --fresh to begin again, or name another folder",
            )
        if resume and not run:
            raise UserError("--resume", str(self.path), "no run to go on with is in this folder; leave --resume out")
        if self.write:
            try:
                if fresh and run:
                    for name in ("steps", "checkpoints", "delta"):
                        shutil.rmtree(self.path / name, ignore_errors=True)
                    (self.path / "log.jsonl").unlink(missing_ok=True)
                self.path.mkdir(parents=True, exist_ok=True)
                (self.path / ".temperament").touch()
            except OSError as problem:
                raise UserError(
                    "--out", str(self.path), f"the folder cannot be written ({problem.strerror}); name another"
                ) from None
        return run

    def run(self) -> dict[str, Any]:
        try:
            found = json.loads((self.path / "run.json").read_text())
            if not isinstance(found, dict):
                raise ValueError("it holds no object")
            return found
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as problem:
            raise UserError("run", str(self.path / "run.json"), f"it cannot be read ({problem}); name another folder") from None

    def save_run(self, run: dict[str, Any]) -> None:
        if self.write:
            write_atomic(self.path / "run.json", json.dumps(run, indent=1, default=str))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One process works on a run folder at a time; the lock goes with the process, also when it is killed."""
        if not self.write:
            yield
            return
        import fcntl

        with open(self.path / ".temperament", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    "--out", str(self.path), "another process is working on this run; wait for it or name another folder"
                ) from None
            yield

    # -- steps ----------------------------------------------------------------------------------------------------------------

    def step(self, name: str) -> Path:
        return self.path / "steps" / name.replace("/", ".")

    def finished(self, name: str, key: str) -> dict[str, Any] | None:
        """The artefact of a step if it was made from exactly this."""
        try:
            artefact = json.loads((self.step(name) / "artefact.json").read_text())
        except (OSError, ValueError):
            return None
        return artefact if artefact.get("key") == key else None

    def finish(self, name: str, key: str, **content: Any) -> dict[str, Any]:
        artefact = {"key": key, "name": name, **content}
        if self.write:
            write_atomic(self.step(name) / "artefact.json", json.dumps(artefact, indent=1, default=str))
        return artefact

    # -- log ------------------------------------------------------------------------------------------------------------------

    def log_cut(self, name: str, after: int) -> None:
        """Forget lines of a step beyond its checkpoint: they are about to be written again."""
        self._log_keep(lambda row: row.get("stage") != name or row.get("step", 0) <= after)

    def log_only(self, names: Container[str]) -> None:
        """Forget lines of steps that the recipe no longer has."""
        self._log_keep(lambda row: row.get("stage") in names)

    def _log_keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        path = self.path / "log.jsonl"
        if not self.write or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # half a line: the process was killed while writing it
            if wanted(row):
                kept.append(line)
        write_atomic(path, "".join(line + "\n" for line in kept))

    @contextmanager
    def logging(self, name: str):
        """A function that appends one row; rows reach the disk in blocks, and always before a checkpoint (flush)."""
        if not self.write:
            yield (lambda row: None), (lambda: None)
            return
        full = lambda problem: WorkFailed(
            f"{path} could not be written ({problem.strerror}); free space, then resume with --resume."
        )
        path = self.path / "log.jsonl"
        try:
            f = open(path, "a", encoding="utf-8", buffering=1 << 16)  # noqa: SIM115 - closed below, where it may fail
        except OSError as problem:
            raise full(problem) from None

        def append(row: dict[str, Any]) -> None:
            try:
                f.write(json.dumps({"stage": name, **row}) + "\n")
            except OSError as problem:
                raise full(problem) from None

        def flush() -> None:
            try:
                f.flush()
            except OSError as problem:
                raise full(problem) from None

        try:
            yield append, flush
        except BaseException:
            with suppress(OSError):
                f.close()
            raise
        try:
            f.close()
        except OSError as problem:
            raise full(problem) from None


# ---- scores ----------------------------------------------------------------------------------------------------------------


def read_outcomes(path: Path, key: str) -> list[Outcome] | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return [Outcome(**o) for o in stored["outcomes"]] if stored["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_outcomes(path: Path, key: str, outcomes: list[Outcome]) -> None:
    write_atomic(path, json.dumps({"key": key, "outcomes": [asdict(o) for o in outcomes]}, default=str))
