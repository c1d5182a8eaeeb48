"""Checkpoints: a folder of safetensors and JSON, complete or absent.

    checkpoints/step-000120/{state.json, live.safetensors, optimizer.safetensors, source.safetensors}

Written to a hidden folder beside, flushed, then renamed: a reader sees a whole checkpoint or none. state.json carries the
sha256 of every file, so a damaged one is noticed and the one before is used. No pickle anywhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from temperament.errors import WorkFailed


def write_atomic(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as problem:
        temporary.unlink(missing_ok=True)
        raise WorkFailed(
            f"{path} could not be written ({problem.strerror}); free space or choose another --out, then resume with --resume."
        ) from None


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int = 2) -> Path:
    """Write checkpoint `step` under `folder`; drop all but the newest `keep`, and those of later steps: they were passed over
    (damaged, or left by another recipe), and as the newest they would hide this one. tensors: file name -> tensors."""
    target = folder / f"step-{step:06d}"
    part = folder / f".step-{step:06d}.{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        sums = {}
        for name, group in tensors.items():
            # save_file refuses shared storage; a checkpoint wants plain copies.
            save_file({k: v.detach().cpu().clone().contiguous() for k, v in group.items()}, part / f"{name}.safetensors")
            sums[f"{name}.safetensors"] = _sha(part / f"{name}.safetensors")
        whole = {**state, "step": step, "files": sums}
        (part / "state.json").write_text(json.dumps({**whole, "sha256": _sum(whole)}, indent=1))
        for file in part.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
        _flush(folder)
    except (OSError, SafetensorError) as problem:
        shutil.rmtree(part, ignore_errors=True)
        reason = getattr(problem, "strerror", None) or str(problem)
        mend = "the one before it is whole: free space, then resume with --resume."
        raise WorkFailed(f"checkpoint {target} could not be written ({reason}); {mend}") from None
    known = newest_last(folder)
    at = known.index(target)
    for old in [*known[at + 1 :], *known[: max(at + 1 - max(keep, 1), 0)]]:
        shutil.rmtree(old, ignore_errors=True)
    for old in folder.glob(".step-*.part"):
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest_last(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by number: names alone would put step 1,000,000 before step 999,999."""
    number = lambda path: int(path.name.removeprefix("step-"))
    return sorted((p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdecimal()), key=number)


def load_newest(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None:
    """The newest checkpoint that is whole, and why newer ones were passed over (state["damaged"]); None when there is none
    at all, a state without a step when none is whole."""
    damaged = []
    for path in reversed(newest_last(folder)):
        try:
            state = json.loads((path / "state.json").read_text())
            if state.pop("sha256") != _sum(state):
                raise ValueError("state.json does not match its sha256")
            for name, want in state["files"].items():
                if Path(name).name != name or _sha(path / name) != want:
                    raise ValueError(f"{name} does not match its sha256")
            tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in state["files"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as problem:
            damaged.append(f"{path.name}: {problem}")
            continue
        return {**state, "damaged": damaged}, tensors
    return ({"damaged": damaged}, {}) if damaged else None


def _sum(state: dict[str, Any]) -> str:
    """sha256 of what a state says, as JSON reads it back."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(state)), sort_keys=True).encode()).hexdigest()


def _flush(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict as (tensors by "index/key", the rest as JSON)."""
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{index}/{key}"] = value
    return tensors, {"scalars": scalars, "groups": state["param_groups"]}


def unflatten_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    entries: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **rest["scalars"]}.items():
        index, name = key.split("/", 1)
        entries.setdefault(int(index), {})[name] = value
    # Group options that JSON turned into lists (betas) are what torch expects as tuples.
    groups = [{k: tuple(v) if k == "betas" else v for k, v in g.items()} for g in rest["groups"]]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})
